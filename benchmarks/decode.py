"""Decoding against transformers: same weights, same prompts, same ids, and the share of the memory's bandwidth.

    python benchmarks/decode.py [--rounds 5] [--batches 1 8 16] [--only step shared guided] [--json FILE]
    python benchmarks/decode.py --gpu [--json FILE]

`step`: greedy continuation of prompts of 512 ids by 256 more, of 8 layers of width 512 in float32 on one pinned core,
against `generate` of transformers' OPT with its dynamic and its static cache. The calls are interleaved, and their ids
compared. Prints the median ratio of their times (above 1: ours is faster) with its extremes, and our share of the
roofline: the time in which this core, by its own measured rate, would read the weights and the filled slots once.
`shared`: 16 samples of one prompt of 2,000 ids: seconds until each has two ids, seconds of a step, and memory above
what the process has before. `guided`: the same with guidance, whose second prompt lacks the last 40 ids, by requests
whose prompts share what they have in common and by others. Each case has its own process. Needs the extra `parity`.

`--gpu`: 2.7B parameters in bfloat16 at a context of 3,072, batches of 1, 16 and 64, against `generate` with
torch.compile and a static cache, each in its own process. `--layers`, `--width`, `--context` and `--new` change sizes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import interleaved, ratio, record

PACKAGES = ("rac3", "jax", "jaxlib", "flax", "torch", "transformers", "numpy")
PARTS = ("step", "shared", "guided")
Sizes = dict[str, int]
CPU: Sizes = {"layers": 8, "width": 512, "heads": 8, "vocab": 8192, "prompt": 512, "new": 256}
GPU: Sizes = {"layers": 32, "width": 2560, "heads": 32, "vocab": 60_032, "prompt": 3008, "new": 64}


def our_engine(sizes: Sizes, rows: int, dtype: Any, cache_bytes: float = 8e9) -> tuple[Any, Any]:
    """(engine, parameters) of random weights."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from rac3.generation.engine import Engine
    from rac3.model.transformer import TransformerConfig
    from rac3.tokens.vocabulary import NUM_MASKS, NUM_SPECIALS, Vocabulary

    config = TransformerConfig(
        num_layers=sizes["layers"], embed=sizes["width"], num_heads=sizes["heads"], mlp=4 * sizes["width"],
        offset_embedding=False, dtype=dtype, remat="none", init_std=0.02,
    )  # fmt: skip
    image = sizes["vocab"] // 8
    vocabulary = Vocabulary(sizes["vocab"] - image - NUM_SPECIALS - NUM_MASKS, image)
    context = sizes["prompt"] + sizes["new"]
    model = config.build(vocabulary.padded_size, context, context)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids, ids, ids))
    return Engine(model, params, vocabulary, rows=rows, cache_bytes=cache_bytes, steps=sizes["new"]), params


def our_call(engine: Any, prompts: Any, new: int) -> Callable[[], Any]:
    """A call that gives `new` ids after each prompt, [rows, new]."""
    import numpy as np

    from rac3.generation.request import Draw, Request
    from rac3.generation.sampling import Sampling
    from rac3.tokens.html import Sequenced

    any_id = Draw(np.ones(engine.model.vocab_size, bool), new)
    requests = [Request([Sequenced(prompt, np.zeros_like(prompt))], [any_id]) for prompt in prompts]

    def call() -> Any:
        found = dict(engine.run(requests, [Sampling(temperature=0.0)] * len(requests), [0] * len(requests)))
        return np.stack([found[index][0].runs[0] for index in range(len(requests))])

    return call


def their_model(sizes: Sizes, dtype: str) -> Any:
    import torch
    import transformers

    make: Any = transformers.OPTConfig  # its stubs know fewer arguments than it takes
    config = make(
        vocab_size=sizes["vocab"], hidden_size=sizes["width"], word_embed_proj_dim=sizes["width"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], ffn_dim=4 * sizes["width"],
        max_position_embeddings=sizes["prompt"] + sizes["new"], dropout=0.0, attn_implementation="sdpa",
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return transformers.OPTForCausalLM(config).to(getattr(torch, dtype)).eval()


def their_call(model: Any, prompts: Any, new: int, cache: str) -> Callable[[], Any]:
    import numpy as np
    import torch

    ids = torch.tensor(np.int64(prompts), device=model.device)
    mask = torch.ones_like(ids)
    options = {"cache_implementation": cache} if cache == "static" else {}

    def call() -> Any:
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True, **options
            )
        return out[:, ids.shape[1] :].cpu().numpy()

    return call


def bytes_of_step(sizes: Sizes, rows: int, itemsize: int) -> float:
    """What a step must read: the weights, and the keys and values of the slots that are filled half way through."""
    width, layers = sizes["width"], sizes["layers"]
    weights = layers * 12 * width**2 + sizes["vocab"] * width
    slots = sizes["prompt"] + sizes["new"] / 2
    return itemsize * (weights + rows * slots * 2 * layers * width)


def read_rate(size: float) -> float:
    """Bytes per second at which one core reads `size` bytes again and again: the fastest of some sums and maxima.

    As many bytes as a step reads: a cache that holds a part of them does so in both.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    host = np.ones((int(size) // 8192, 2048), np.float32)
    flat, ones = host.ravel(), jnp.ones(2048)
    device, tensor, vector, rows = jnp.asarray(host), torch.from_numpy(host), torch.ones(2048), jax.jit(jnp.matmul)
    calls: dict[str, Callable[[], Any]] = {
        "squares, numpy": lambda: np.dot(flat, flat),
        "maximum, numpy": flat.max,
        "rows, torch": lambda: torch.mv(tensor, vector),
        "rows, jax": lambda: jax.block_until_ready(rows(device, ones)),
    }
    return float(host.nbytes / min(min(times) for times in interleaved(calls, 5).values()))


def step(batch: int, rounds: int, sizes: Sizes) -> dict[str, Any]:
    import numpy as np
    from train import load_opt

    rate = read_rate(bytes_of_step(sizes, batch, 4))
    prompts = np.random.default_rng(0).integers(8, sizes["vocab"] - 16, (batch, sizes["prompt"])).astype(np.int32)
    engine, params = our_engine(sizes, batch, "float32")
    theirs = their_model(sizes, "float32")
    load_opt(theirs, params)
    calls = {"ours": our_call(engine, prompts, sizes["new"])}
    calls |= {cache: their_call(theirs, prompts, sizes["new"], cache) for cache in ("dynamic", "static")}
    ids = {name: call() for name, call in calls.items()}
    same = {name: float(np.mean(ids[name] == ids["ours"])) for name in ("dynamic", "static")}
    if any((ids[name][:, :16] != ids["ours"][:, :16]).any() for name in same):
        sys.exit(f"the first ids of the same weights after the same prompts differ; {same} of all are the same")
    # Two more calls, of two ids each, without which a time is that of the steps alone.
    calls |= {
        "ours, prefill": our_call(engine, prompts, 2),
        "dynamic, prefill": their_call(theirs, prompts, 2, "dynamic"),
    }
    times = interleaved(calls, rounds)
    fastest = min(("dynamic", "static"), key=lambda name: min(times[name]))
    steps = sizes["new"] - 2
    own = (min(times["ours"]) - min(times["ours, prefill"])) / steps
    return {
        "case": f"batch {batch}",
        "over_ours": {name: ratio(times[name], times["ours"]) for name in ("dynamic", "static")},
        "fastest_peer": fastest,
        "seconds": {name: round(min(found), 3) for name, found in times.items()},
        "step_ms": round(1e3 * own, 2),
        "dynamic_step_ms": round(1e3 * (min(times["dynamic"]) - min(times["dynamic, prefill"])) / steps, 2),
        "read_gb_per_second": round(rate / 1e9, 1),
        "roofline_share": round(bytes_of_step(sizes, batch, 4) / rate / own, 3),
        "same_ids": same,
    }


def shared(samples: int, sizes: Sizes, endings: int = 0) -> dict[str, Any]:
    """Of one prompt of 2,000 ids, each sample up to 256 more.

    Args:
      endings: with guidance, whether its two prompts share what they have in common (2) or not (1); 0 is no guidance.
    """
    import numpy as np

    from rac3.generation.request import Draw, Request
    from rac3.generation.sampling import Guidance, Sampling
    from rac3.tokens.html import Sequenced

    engine, _ = our_engine(sizes, samples * (2 if endings else 1), "float32")
    base = _resident()
    prompt = np.random.default_rng(0).integers(8, sizes["vocab"] - 16, sizes["prompt"] - 48).astype(np.int32)
    prompts = [Sequenced(ids, np.zeros_like(ids)) for ids in (prompt, prompt[:-40])[: 2 if endings else 1]]
    grammar = [Draw(np.ones(engine.model.vocab_size, bool), sizes["new"])]
    request = Request(prompts, grammar, samples, endings=endings or 1)
    sampling = Sampling(guidance=Guidance(3.0 if endings else 1.0))

    def run() -> tuple[float, float]:
        """Seconds until the first report, which comes after two steps, and of a step after that."""
        marks = [time.perf_counter()]
        engine.steps = 2

        def mark(_: Any) -> None:
            marks.append(time.perf_counter())
            engine.steps = 8

        dict(engine.run([request], [sampling], [0], mark))
        return marks[1] - marks[0], (marks[-1] - marks[1]) / (sizes["new"] - 2)

    compiled = run()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = [run() for _ in range(3)]
    return {
        "case": f"{samples} samples of a prompt of {len(prompt):,} ids"
        + ("", ", guided, two caches", ", guided, one cache")[endings],
        "prefill_and_two_steps_seconds": round(min(first for first, _ in times), 3),
        "with_compilation_seconds": round(compiled, 2),
        "step_ms": round(1e3 * min(each for _, each in times), 2),
        "memory_above_base_gb": round((peak - base) / 1e9, 3),
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def gpu(who: str, batch: int, sizes: Sizes) -> dict[str, Any]:
    """One side, one batch: compilation, then the best of two calls of all ids, less that of two ids."""
    import numpy as np

    prompts = np.random.default_rng(0).integers(8, sizes["vocab"] - 16, (batch, sizes["prompt"])).astype(np.int32)
    if who == "ours":
        engine, params = our_engine(sizes, batch, "bfloat16", cache_bytes=1e11)
        del params  # the float32 ones
        make: Callable[[int], Callable[[], Any]] = lambda new: our_call(engine, prompts, new)  # noqa: E731
        rate = _gpu_read_rate()
    else:
        import torch

        theirs = their_model(sizes, "bfloat16")
        theirs.generation_config.compile_config = None  # as `generate` compiles by default, with a static cache
        make = lambda new: their_call(theirs, prompts, new, "static")  # noqa: E731
        torch.set_float32_matmul_precision("high")
        rate = 0.0
    started = time.perf_counter()
    make(sizes["new"])(), make(2)()
    compiled = time.perf_counter() - started
    whole, short = (min(_timed(make(new)) for _ in range(2)) for new in (sizes["new"], 2))
    seconds = (whole - short) / (sizes["new"] - 2)
    row = {"who": who, "batch": batch, "step_ms": 1e3 * seconds, "prefill_seconds": short, "first_seconds": compiled}
    if rate:
        row |= {"read_gb_per_second": rate / 1e9, "roofline_share": bytes_of_step(sizes, batch, 2) / rate / seconds}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _gpu_read_rate() -> float:
    import jax
    import jax.numpy as jnp

    size = 2**31 if jax.default_backend() == "gpu" else 2**26
    array, total = jnp.ones(size, jnp.bfloat16), jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    times = interleaved({"sum": lambda: jax.block_until_ready(total(array))}, 5)
    return 2 * size / min(times["sum"])


def in_process(part: str, arguments: argparse.Namespace, *more: str, timeout: float | None = None) -> dict[str, Any]:
    """Runs one case in its own process; what it prints on its last line is the result."""
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / "row.json"
        options = [part, *more, "--rounds", str(arguments.rounds), "--row", str(row)]
        for name in ("layers", "width", "prompt", "new"):
            if getattr(arguments, name):
                options += [f"--{name}", str(getattr(arguments, name))]
        try:
            subprocess.run([sys.executable, __file__, "--case", *options], check=True, timeout=timeout)
            result: dict[str, Any] = json.loads(row.read_text(encoding="utf-8"))
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            if timeout is None:
                raise
            result = {"case": [part, *more], "failed": type(error).__name__}
    print(json.dumps(result), flush=True)
    return result


def one_case(arguments: argparse.Namespace) -> None:
    part, *more = arguments.case
    given = {
        name: getattr(arguments, name) for name in ("layers", "width", "prompt", "new") if getattr(arguments, name)
    }
    if part == "gpu":
        sizes = {**GPU, **given}
        result = gpu(more[0], int(more[1]), sizes)
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
        import torch

        torch.set_num_threads(1)
        if part == "step":
            result = step(int(more[0]), arguments.rounds, {**CPU, **given})
        else:
            result = shared(16, {**CPU, "prompt": 2048, **given}, *map(int, more))
    arguments.row.write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--gpu", action="store_true")
    for name in ("layers", "width", "prompt", "new"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        one_case(arguments)
        return
    results: dict[str, Any] = {}
    if arguments.gpu:
        ends = time.monotonic() + 500  # a call of this must end within nine minutes
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # the caches of 64 rows take 64 of 80 GB
        results["gpu"] = [
            in_process("gpu", arguments, who, str(batch), timeout=max(1.0, ends - time.monotonic()))
            for batch in arguments.batches or (1, 16, 64)
            for who in ("ours", "transformers")
        ]
    else:
        if "step" in arguments.only:
            batches = arguments.batches or (1, 8, 16)
            results["step"] = [in_process("step", arguments, str(batch)) for batch in batches]
        if "shared" in arguments.only:
            results["shared"] = [in_process("shared", arguments)]
        if "guided" in arguments.only:
            results["guided"] = [in_process("shared", arguments, endings) for endings in ("1", "2")]
    if arguments.json:
        command = " ".join(["python benchmarks/decode.py", *sys.argv[1:]])
        arguments.json.write_text(record(command, PACKAGES, results), encoding="utf-8")


if __name__ == "__main__":
    main()
