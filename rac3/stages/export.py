"""Export: a trained model as a folder for Hugging Face's transformers, or for a few lines of NumPy."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rac3.artifacts.files import refused
from rac3.artifacts.workdir import temporary_path
from rac3.config import InputError, canonical
from rac3.model.exchange import OPT, TOKENIZER, model_type, write_model
from rac3.run import Run


@dataclass(frozen=True)
class ExportOptions:
    """What `export` takes besides the experiment.

    Attributes:
      folder: the folder to write, new or empty.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")] = ""


def export(run: Run, options: ExportOptions) -> str:
    """Writes the model that `train` ended with, whole or not at all. Gives a line that says what was written.

    Raises:
      InputError: no folder, one that holds files, or a model that isn't trained.
    """
    if not options.folder:
        raise InputError("`rac3 export` needs a folder to write, new or empty: rac3 export CONFIG DIR")
    target = Path(options.folder)
    _check_free(target)
    model, params = run.model, run.params
    more = {
        "experiment": run.experiment.name,
        "tokens_per_image": run.images.tokens_per_image,
        "masking": canonical(run.experiment.batches.masking),
    }
    with _whole(target) as folder:
        run.tokenizer.save(folder / TOKENIZER)
        size = write_model(folder, model, params, run.vocabulary, more)
    reader = "transformers' OPTForCausalLM" if model_type(model) == OPT else "the code in docs/checkpoints.md"
    return f"export: {run.experiment.model_name}, {size / 1e6:.1f} MB in {target}, for {reader}"


def _check_free(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder; give a new one")


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends without an error, and is deleted otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_path(target)
    folder.mkdir()
    try:
        with refused(target.parent):
            yield folder
            for path in [*folder.rglob("*"), folder]:
                opened = os.open(path, os.O_RDONLY)
                os.fsync(opened)
                os.close(opened)
        _check_free(target)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
