"""The training step on one GPU: real tokens per second and MFU in both counts, and torch's.

    python benchmarks/train_gpu.py [--size 350m] [--groups 8] [--steps 10] [--minutes 8.5] [--json FILE]

The groups are the paper's: K in {0, 1, 2} retrieved documents before a main one, of some 1,061 tokens each, in
bfloat16. Measured are, one process each: rac3 with the groups packed into rows of 16,384, for each policy of
rematerialization and each form of attention; rac3 with one group a row; transformers' OPT with torch.compile, SDPA
under autocast and fused AdamW, with one group a row, from the same weights. Padding does not count. What fails or finds
no time left is recorded as such, so that one call ends within the minutes given. Losses of the first step are recorded:
they agree to about 1e-2.

Without a GPU, `--size tiny` runs the same on CPUs, where torch is not compiled and the peak, hence the MFU, is unknown.
Needs the extra `parity`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import record, seconds
from train import PACKAGES, Size, our_step, torch_step, training_case

SIZES = {
    "tiny": (Size(2, 64, 4, 512, "bfloat16"), 33),  # and the tokens of a document
    "125m": (Size(12, 768, 12, 60_032, "bfloat16"), 1061),
    "350m": (Size(24, 1024, 16, 60_032, "bfloat16"), 1061),
    "1.3b": (Size(24, 2048, 32, 60_032, "bfloat16"), 1061),
}
DOCUMENTS_A_ROW = 15  # 16,384 // 1,061
CONTESTANTS = [  # who, rows, the policy of rematerialization, the form of attention
    ("rac3", "packed", "dots", "auto"),
    ("torch", "one group a row", "none", "sdpa"),
    ("rac3", "one group a row", "dots", "auto"),
    ("rac3", "packed", "dots", "cudnn"),
    ("rac3", "packed", "none", "auto"),
    ("rac3", "packed", "attention", "auto"),
    ("rac3", "packed", "full", "auto"),
    ("rac3", "packed", "dots", "blockwise"),
]


def groups_of(count: int, document: int) -> list[int]:
    """Tokens of each group."""
    import numpy as np

    return [int(document * documents) for documents in np.random.default_rng(0).integers(1, 4, count)]


def measured(
    who: str, rows: str, remat: str, attention: str, size: Size, document: int, groups: int, steps: int
) -> dict[str, Any]:
    """One contestant, in this process."""
    import numpy as np

    from rac3.batches.packing import pack

    lengths, longest = groups_of(groups, document), DOCUMENTS_A_ROW * document
    packed = [[lengths[group] for group in row] for row in pack(np.array(lengths), longest)]
    form = {"attention": attention} if who == "rac3" else {}
    case = packed if rows == "packed" else [[n] for n in lengths]
    model, params, batch = training_case(case, size, remat=remat, **form)
    call, device, memory = ours(model, params, batch) if who == "rac3" else torchs(params, batch, size)
    started = time.perf_counter()
    loss = call()
    first = time.perf_counter() - started
    for _ in range(2):
        call()
    times = [seconds(call) for _ in range(steps)]
    return {
        "first_step_seconds": round(first, 1),
        "step_seconds": round(statistics.median(times), 4),
        "step_seconds_extremes": [round(min(times), 4), round(max(times), 4)],
        "loss": round(loss, 4),
        "device": device,
        "form": str(model.packed) if who == "rac3" else "SDPA",
        "memory_gb": round(memory() / 1e9, 1),
        **rates(model, batch, statistics.median(times), device),
    }


def ours(model: Any, params: Any, batch: Any) -> tuple[Callable[[], float], str, Callable[[], int]]:
    """A step, the device's name, and the most bytes that were in use on it."""
    import jax

    device = jax.devices()[0]
    return (
        our_step(model, params, batch),
        device.device_kind,
        lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
    )


def torchs(params: Any, batch: Any, size: Size) -> tuple[Callable[[], float], str, Callable[[], int]]:
    import torch

    torch.set_float32_matmul_precision("high")
    if not torch.cuda.is_available():
        return torch_step(params, batch, "sdpa", size), "cpu", lambda: 0
    step = torch_step(params, batch, "sdpa", size, "cuda")
    return step, torch.cuda.get_device_name(), torch.cuda.max_memory_allocated


def rates(model: Any, batch: Any, step: float, device: str) -> dict[str, Any]:
    """Real tokens per second, and MFU with attention to all tokens of a group, and to the earlier ones alone."""
    from rac3.training.flops import PEAKS, step_flops

    real = int((batch.segments > 0).sum())
    found = {"real_tokens": real, "real_share": round(real / batch.segments.size, 3)}
    found["tokens_per_second"] = round(real / step)
    for name, flops in zip(("full", "causal"), step_flops(model, batch), strict=True):
        peak = PEAKS.get(device)
        found[f"mfu_{name}"] = round(float(flops) / step / peak, 3) if peak else None
    return found


def child(arguments: argparse.Namespace, contestant: tuple[str, ...], limit: float) -> dict[str, Any]:
    """`measured` in a process that ends after `limit` seconds."""
    command = [sys.executable, __file__, "--contestant", *contestant, "--size", arguments.size]
    command += ["--groups", str(arguments.groups), "--steps", str(arguments.steps)]
    # Torch shares the GPU with nobody: our weights are made on the CPU.
    env = {**os.environ, **({"JAX_PLATFORMS": "cpu"} if contestant[0] == "torch" else {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1] if lines else "no output"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="350m")
    parser.add_argument("--groups", type=int, default=8, help="in a step")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contestant", nargs=4, help=argparse.SUPPRESS)  # what a child process measures
    arguments = parser.parse_args()
    if arguments.contestant:
        found = measured(*arguments.contestant, *SIZES[arguments.size], arguments.groups, arguments.steps)
        print(json.dumps(found))
        return
    deadline, results = time.monotonic() + 60 * arguments.minutes, []
    for contestant in CONTESTANTS:
        left = deadline - time.monotonic()
        found = child(arguments, contestant, left) if left > 30 else {"error": "no time left"}
        results.append({**dict(zip(("who", "rows", "remat", "attention"), contestant, strict=True)), **found})
        print(json.dumps(results[-1]), flush=True)
        if arguments.json:  # after each, in case the call is cut short
            command = f"python benchmarks/train_gpu.py --size {arguments.size} --groups {arguments.groups}"
            arguments.json.write_text(record(command, PACKAGES, results), encoding="utf-8")


if __name__ == "__main__":
    main()
