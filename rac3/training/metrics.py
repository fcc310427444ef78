"""The metrics of a training run, as JSON lines and for TensorBoard."""

import json
from pathlib import Path
from typing import Any

import jax

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
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file = path.open("a")
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
        self.board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run so far, without a last line that a kill truncated."""
    path = folder / METRICS_FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
