"""The training step against torch: same weights, same batch, same threads; the memory of attention; compile times.

    python benchmarks/train.py [--threads 1 2] [--rounds 9] [--json FILE] [--only step memory compile checkpoint]

`step`: forward, backward, clipping and AdamW of 4 layers of width 512 in float32, against transformers' OPT with
torch's fused AdamW, eager and with scaled_dot_product_attention; on a row of one group, and on a row of packed groups,
for which SDPA gets a block-diagonal mask. Losses are compared first. Each number of threads gets its own process,
pinned to as many cores, which runs all of them alternately, all with the settings of the C library that `rac3 train`
makes. Prints the median ratio (above 1: ours is faster) with its extremes, and our share of the rate of a large matrix
product. Needs the extra `parity`.

`memory`: temporary bytes of attention with 32 heads of 80, forward and backward, from the compiled program.
`compile`: seconds to compile the step of 8 and of 32 layers.
`checkpoint`: the share of a save that the training loop waits for.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from measure import interleaved, ratio, record

PACKAGES = ("rac3", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "numpy")
PARTS = ("step", "memory", "compile", "checkpoint")
ROWS = {"one group of 1,024": [[1024]], "a row of 4,096, four groups": [[1000, 1100, 950, 1046]]}


@dataclass(frozen=True)
class Size:
    """Of the model."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    vocab: int = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"


def training_case(rows: list[list[int]], size: Size = Size(), **fields: Any) -> tuple[Any, Any, Any]:
    """(model, parameters, batch) of rows that hold groups of these lengths, padded to the longest row.

    Args:
      fields: more of the model's config.
    """
    import flax.linen as nn
    import jax
    import numpy as np

    from rac3.batches.packing import MAIN_TEXT, PackedBatch
    from rac3.model.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=size.layers, embed=size.width, num_heads=size.heads, mlp=4 * size.width, offset_embedding=False,
        dtype=size.dtype, init_std=0.02, **{"remat": "none", **fields},
    )  # fmt: skip
    seq, longest = max(map(sum, rows)), max(map(max, rows))
    model = config.build(size.vocab, longest, 1, max(map(len, rows)))
    ids = np.random.default_rng(0).integers(0, size.vocab, (2, len(rows), seq)).astype(np.int32)
    segments, positions = np.zeros((2, len(rows), seq), np.int32)
    for row, lengths in enumerate(rows):
        real = slice(sum(lengths))
        segments[row, real] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions[row, real] = np.concatenate([np.arange(length) for length in lengths])
    weight = (segments > 0).astype(np.float32)
    batch = PackedBatch(ids[0], ids[1], segments, positions, 0 * segments, weight, np.full_like(segments, MAIN_TEXT))
    init = jax.jit(model.init)(jax.random.key(0), *[np.zeros((1, 2), np.int32)] * 4)
    return model, nn.unbox(init), batch


def our_step(model: Any, params: Any, batch: Any) -> Callable[[], float]:
    """A call that trains one step and gives its loss."""
    import jax
    import jax.numpy as jnp

    from rac3.training.optimizer import OptimizerConfig
    from rac3.training.state import TrainState
    from rac3.training.step import make_train_step

    optimizer = OptimizerConfig().build(1000)
    params = jax.tree.map(jnp.array, params)
    holder = [TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))]
    step, batch = make_train_step(model, optimizer, chunk=256), jax.tree.map(jnp.asarray, batch)

    def call() -> float:
        state, metrics = step(holder[0], batch)
        holder[0] = jax.block_until_ready(state)
        total, count = metrics["loss"]
        return float(total) / float(count)

    return call


def torch_step(
    params: Any, batch: Any, attention: str, size: Size = Size(), device: str = "cpu"
) -> Callable[[], float]:
    """The same by transformers and torch; on a GPU, compiled by torch.compile."""
    import numpy as np
    import torch
    import transformers

    seq = batch.tokens.shape[1]
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=size.vocab, hidden_size=size.width, word_embed_proj_dim=size.width,
            num_hidden_layers=size.layers, num_attention_heads=size.heads, ffn_dim=4 * size.width,
            max_position_embeddings=seq, dropout=0.0, attn_implementation=attention, use_cache=False,
        )
    ).train()  # fmt: skip
    load_opt(model, params)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    targets = np.where(batch.loss_weight > 0, batch.targets, -100)  # which cross_entropy leaves out
    ids, targets = (torch.tensor(np.int64(x), device=device) for x in (batch.tokens, targets))
    more: dict[str, Any] = {}
    if batch.segments.max() > 1:
        seen = (batch.segments[:, :, None] == batch.segments[:, None, :]) & np.tril(np.ones((seq, seq), bool))
        bias = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)
        more = {"attention_mask": bias[:, None], "position_ids": torch.tensor(np.int64(batch.positions))}
        more = {name: value.to(device) for name, value in more.items()}
    forward = model if device == "cpu" else torch.compile(model)

    def call() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=size.dtype == "bfloat16"):
            logits = forward(ids, **more).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return call


def load_opt(model: Any, params: Any) -> None:
    """Gives transformers' OPT our weights."""
    import numpy as np
    import torch

    ours = params["params"]
    positions = np.asarray(ours["position_embedding"])
    layers, width = ours["blocks"]["mlp_norm"]["scale"].shape
    table = model.model.decoder.embed_positions.weight.shape[0]
    state = {
        "embed_tokens.weight": ours["token_embedding"],
        "embed_positions.weight": np.pad(positions, ((2, table - 2 - len(positions)), (0, 0))),  # OPT's begin at row 2
        "final_layer_norm.weight": ours["final_norm"]["scale"],
        "final_layer_norm.bias": ours["final_norm"]["bias"],
    }
    blocks = ours["blocks"]
    for layer in range(layers):
        prefix, attention = f"layers.{layer}.", blocks["attention"]
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            kernel, bias = attention["qkv_kernel"][layer][:, part], attention["qkv_bias"][layer][part]
            state[f"{prefix}self_attn.{name}.weight"] = kernel.reshape(width, width).T
            state[f"{prefix}self_attn.{name}.bias"] = bias.reshape(width)
        state[f"{prefix}self_attn.out_proj.weight"] = attention["out_kernel"][layer].reshape(width, width).T
        state[f"{prefix}self_attn.out_proj.bias"] = attention["out_bias"][layer]
        for theirs, name in (("self_attn_layer_norm", "attention_norm"), ("final_layer_norm", "mlp_norm")):
            state[f"{prefix}{theirs}.weight"] = blocks[name]["scale"][layer]
            state[f"{prefix}{theirs}.bias"] = blocks[name]["bias"][layer]
        for theirs, name in (("fc1", "mlp_in"), ("fc2", "mlp_out")):
            state[f"{prefix}{theirs}.weight"] = blocks[name]["kernel"][layer].T
            state[f"{prefix}{theirs}.bias"] = blocks[name]["bias"][layer]
    model.model.decoder.load_state_dict({name: torch.tensor(np.array(value)) for name, value in state.items()})


def steps(threads: int, rounds: int) -> list[dict[str, Any]]:
    """In this process, pinned to `threads` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    from rac3.devices.cpu import keep_freed_memory

    keep_freed_memory()  # as `rac3 train` does; torch allocates from the same heap
    import torch

    torch.set_num_threads(threads)
    best, rows = product_rate(), []
    for name, groups in ROWS.items():
        model, params, batch = training_case(groups)
        calls = {
            "ours": our_step(model, params, batch),
            **{each: torch_step(params, batch, each) for each in ("sdpa", "eager")},
        }
        losses = {each: call() for each, call in calls.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4:
            sys.exit(f"the losses of the same weights on the same batch differ: {losses}")
        times = interleaved(calls, rounds)
        row = {
            "case": name,
            "threads": threads,
            "sdpa_over_ours": ratio(times["sdpa"], times["ours"]),
            "eager_over_ours": ratio(times["eager"], times["ours"]),
            "seconds": {each: round(min(found), 3) for each, found in times.items()},
            "share_of_matmul_rate": round(product_flops(Size(), batch) / min(times["ours"]) / best, 3),
            "matmul_gflops": round(best / 1e9),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def product_flops(size: Size, batch: Any) -> int:
    """FLOPs of the matrix products of a step, without attention's."""
    return int(6 * (size.layers * 12 * size.width**2 + size.vocab * size.width) * batch.tokens.size)


def product_rate() -> float:
    """FLOP/s of a large matrix product in float32."""
    import jax
    import jax.numpy as jnp

    size = 2048
    x = jnp.ones((size, size))
    product = jax.jit(jnp.dot)
    times = interleaved({"product": lambda: jax.block_until_ready(product(x, x))}, 7)
    return float(2 * size**3 / min(times["product"]))


def attention_memory() -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from rac3.model.packed import FORMS, PackedAttention

    rows = []
    for seq in (4096, 16_384):
        for form in ("plain", "blockwise"):
            attend = functools.partial(FORMS[form], PackedAttention(form))

            def both(q: Any, k: Any, v: Any, segments: Any, cotangent: Any, attend: Any = attend) -> Any:
                out, transpose = jax.vjp(functools.partial(attend, segments=segments), q, k, v)
                return out, transpose(cotangent)

            x = jax.ShapeDtypeStruct((1, seq, 32, 80), jnp.float32)
            ids = jax.ShapeDtypeStruct((1, seq), jnp.int32)
            analysis = jax.jit(both).lower(x, x, x, ids, x).compile().memory_analysis()
            rows.append({"row": seq, "form": form, "temporary_gb": round(analysis.temp_size_in_bytes / 1e9, 3)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def compile_seconds() -> list[dict[str, Any]]:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from rac3.batches.packing import PackedBatch
    from rac3.model.transformer import TransformerConfig
    from rac3.training.optimizer import OptimizerConfig
    from rac3.training.state import TrainState
    from rac3.training.step import make_train_step

    size, rows = Size(), []
    for layers in (8, 32):
        config = TransformerConfig(num_layers=layers, embed=size.width, num_heads=size.heads, mlp=4 * size.width)
        model = config.build(size.vocab, 1024, 1)
        ids, optimizer = jax.ShapeDtypeStruct((1, 1024), jnp.int32), OptimizerConfig().build(1000)

        def state(key: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            params = nn.unbox(model.init(key, *[jnp.zeros((1, 2), jnp.int32)] * 4))
            return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

        weights = jax.ShapeDtypeStruct((1, 1024), jnp.float32)
        batch = PackedBatch(ids, ids, ids, ids, ids, weights, ids)
        lowered = make_train_step(model, optimizer).lower(jax.eval_shape(state, jax.random.key(0)), batch)
        started = time.perf_counter()
        lowered.compile()
        rows.append({"layers": layers, "seconds": round(time.perf_counter() - started, 2)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def checkpoint_share() -> dict[str, Any]:
    """Seconds that a save blocks, and takes in all, of the state of about 100 million parameters."""
    import jax.numpy as jnp

    from rac3.training.checkpoint import Checkpoints
    from rac3.training.state import TrainState

    arrays = {f"layer{number}": jnp.ones((1024, 1024)) * number for number in range(100)}
    state = TrainState(jnp.zeros((), jnp.int32), arrays, {"mu": arrays, "nu": arrays})
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        started = time.perf_counter()
        checkpoints.save(1, state, [0, 0])
        blocked = time.perf_counter() - started
        checkpoints.close()
        whole = time.perf_counter() - started
    row = {"gigabytes": 1.26, "blocked_seconds": round(blocked, 3), "seconds": round(whole, 3)}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # where a child process writes its results
    arguments = parser.parse_args()
    if arguments.rows:
        arguments.rows.write_text(json.dumps(steps(arguments.threads[0], arguments.rounds)), encoding="utf-8")
        return
    results: dict[str, Any] = {}
    if "step" in arguments.only:
        results["step"] = []
        for threads in arguments.threads:
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "rows.json"
                options = ["--threads", str(threads), "--rounds", str(arguments.rounds), "--rows", str(rows)]
                subprocess.run([sys.executable, __file__, *options], check=True)
                results["step"] += json.loads(rows.read_text(encoding="utf-8"))
    if "memory" in arguments.only:
        results["memory"] = attention_memory()
    if "compile" in arguments.only:
        results["compile"] = compile_seconds()
    if "checkpoint" in arguments.only:
        results["checkpoint"] = checkpoint_share()
    if arguments.json:
        threads, parts = " ".join(map(str, arguments.threads)), " ".join(arguments.only)
        command = f"python benchmarks/train.py --threads {threads} --rounds {arguments.rounds} --only {parts}"
        arguments.json.write_text(record(command, PACKAGES, results), encoding="utf-8")


if __name__ == "__main__":
    main()
