"""The experiment that a workdir was made with, in the workdir: `rac3.load` needs no config."""

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from rac3.answering import Model
from rac3.artifacts.files import sealed, unsealed
from rac3.artifacts.workdir import Workdir, write_atomic
from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError, from_plain, load_config_module, to_plain
from rac3.experiment import Experiment
from rac3.run import Run, keep_programs
from rac3.vqgan.frozen import FrozenVQGAN

EXPERIMENT = "experiment.json"  # of a workdir: the experiment that it was made with


def describe(run: Run) -> None:
    """Writes the experiment into its workdir, for `load`: plain data, overrides included, relative paths resolved."""
    plain = {
        "arguments": run.workdir.arguments,
        "experiment": to_plain(_with_absolute_paths(run.experiment)),
    }
    write_atomic(run.workdir.path / EXPERIMENT, sealed(plain))


def _with_absolute_paths(experiment: Experiment) -> Experiment:
    """A notebook runs in another folder than the command did."""
    folders: dict[str, Any] = {name: _absolute(getattr(experiment, name)) for name in ("data_dir", "takedowns")}
    text = replace(experiment.text, checkpoint=_absolute(experiment.text.checkpoint))
    frozen: dict[str, Any] = {
        name: replace(config, checkpoint=_absolute(config.checkpoint))
        for name, config in (("vqgan", experiment.vqgan), ("clip", experiment.clip))
        if isinstance(config, FrozenVQGAN | FrozenCLIP)
    }
    model = replace(experiment.model, init_from=_absolute(experiment.model.init_from))
    return replace(experiment, **folders, text=text, model=model, **frozen)


def _absolute(path: str | None) -> Any:
    """The absolute form of a path that exists; names on a hub, and what is empty, stay as they are."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def load(workdir: str | os.PathLike[str], config: str | os.PathLike[str] | None = None) -> Model:
    """Opens a workdir that `rac3 run` or the stages have made.

        model = rac3.load("runs/quickstart")

    Args:
      config: the config file, needed only if the experiment uses classes defined in it (a retriever, an encoder):
        a workdir holds plain data, and no code is run out of it.

    Raises:
      InputError: the folder holds no experiment, or one that uses classes of a config that is not given.
    """
    folder = Path(workdir)
    record = folder / EXPERIMENT
    if not record.is_file():
        raise InputError(f"{folder} holds no {EXPERIMENT}, so it is no workdir; give the folder that `rac3 run` made")
    try:
        plain = unsealed(record)
        arguments, stored = plain["arguments"], plain["experiment"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{record} is damaged ({error}); run the command that made the workdir again") from error
    module = None if config is None else load_config_module(os.fspath(config))
    try:
        experiment = from_plain(stored, module)
    except KeyError as error:
        raise InputError(
            f"{folder} was made with {error.args[0].rpartition('.')[2]}, a class defined in its config; give the file: "
            f"rac3.load({str(folder)!r}, config={(shlex.split(arguments) or ['config.py'])[0]!r})"
        ) from error
    except (TypeError, InputError) as error:
        raise InputError(f"{record} was written by another version of rac3 ({error}); run the command again") from error
    if not isinstance(experiment, Experiment):
        raise InputError(f"{record} holds no experiment; run the command that made the workdir again")
    keep_programs(folder)
    return Model(experiment, Workdir(folder, experiment.name, arguments))
