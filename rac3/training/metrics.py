"""The metrics of a training run, as JSON lines and for TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rac3.model.losses import Metrics
from rac3.training.flops import peak_flops
from rac3.training.state import TrainState

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `folder/metrics.jsonl`, and to event files in `folder/tensorboard`. Only the first process writes.

    Lines of steps after `start` are dropped first: a resumed run writes them again.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX import SummaryWriter

        self.writes = jax.process_index() == 0
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= start]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if not self.writes:
            return
        self.file.close()
        try:
            self.board.close()
        except OSError:  # it would try again when Python ends, and print how that fails
            if self.board.file_writer is not None:
                events = self.board.file_writer.event_writer
                events._worker.stop()
                events._closed = True
            raise


class Window:
    """The metrics of the steps between two log lines: summed on the devices, and read when the next window ends, so
    that no device waits for the host.

    Attributes:
      note: the loss of the window that was read last, for a progress line.
      read: the last step of that window.
      skipped: the last so many batches up to there were skipped.
    """

    def __init__(self, writer: MetricsWriter) -> None:
        self.writer, self.peak = writer, peak_flops()
        self.note, self.read, self.skipped = "", 0, 0
        self.pending: tuple[int, Metrics, jax.Array, int, float, float] | None = None
        self.sums: Metrics | None = None
        self.steps, self.wait, self.started = 0, 0.0, time.monotonic()

    def add(self, metrics: Metrics, wait: float) -> None:
        self.sums = metrics if self.sums is None else jax.tree.map(lambda a, b: a + b, self.sums, metrics)
        self.steps += 1
        self.wait += wait

    def close(self, step: int, state: TrainState) -> None:
        """Ends the window after `step`, of which `state` is the result."""
        if self.sums is None:
            return
        self.flush()
        skipped = jnp.copy(state.skipped)  # the next step takes over the state's memory
        self.pending = (step, self.sums, skipped, self.steps, self.wait, time.monotonic() - self.started)
        self.sums, self.steps, self.wait, self.started = None, 0, 0.0, time.monotonic()

    def flush(self) -> None:
        """Writes the window that was closed last, if any, without means over nothing (no retrieved text, say)."""
        if self.pending is None:
            return
        step, sums, skipped, steps, wait, seconds = self.pending
        self.pending, self.read, self.skipped = None, step, int(skipped)
        totals = {name: (float(total), float(count)) for name, (total, count) in jax.device_get(sums).items()}
        values = {name: total / count for name, (total, count) in totals.items() if count > 0}
        values |= {"step_seconds": seconds / steps, "input_wait_seconds": wait / steps}
        values["skipped_steps"] = totals["skipped_steps"][0]
        if "real_tokens" in values:
            values["tokens_per_second"] = totals["real_tokens"][0] / seconds
        for name in [name for name in values if name.startswith("flops/")]:
            del values[name]
            if self.peak is not None:
                values[name.replace("flops", "mfu")] = totals[name][0] / seconds / self.peak
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
        if known := [peak for peak in peaks if peak is not None]:
            values["device_memory_bytes"] = max(known)
        self.note = f"loss {values['loss']:.3f}" if "loss" in values else ""
        self.writer.write(step, values)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run so far, without a last line that a kill truncated."""
    path = folder / METRICS_FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
