"""Published VQGANs: which family a checkpoint is of, its files, and the VQGAN in them.

A family is one module of `families/`, whose docstring says which checkpoints it reads, and an entry of `FAMILIES`.
"""

from dataclasses import replace
from pathlib import Path

from rac3.config import InputError, quoted
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.families import chameleon, diffusers, llamagen, taming
from rac3.vqgan.files import TORCH_SUFFIXES, CheckpointFiles, folder_files, torch_files
from rac3.vqgan.model import at_resolution
from rac3.weights.checkpoint_files import one_line, read_json

FAMILIES = (diffusers.FAMILY, chameleon.FAMILY, llamagen.FAMILY, taming.FAMILY)
"""The first that claims the files of a checkpoint loads it."""


def load_vqgan(path: Path, resolution: int | None = None) -> VQGANCheckpoint:
    """The VQGAN of a published checkpoint, its parameters in float32; `path` is its weights, its config or its folder.

    `resolution` (pixels) replaces the config's: the layers stay as they are, and the tokens follow its square. The
    configs of diffusers often name another one than the model was trained at, and LlamaGen's files name none.

    Raises:
      InputError: a file is missing, truncated or not what its name says; the family or one of its settings is not
        supported; the weights are not those of the config.
    """
    files = checkpoint_files(path)
    with one_line(f"VQGAN checkpoint {str(path)!r}"):
        checkpoint = next(family for family in FAMILIES if family.claims(files)).load(files)
    if resolution is None:
        return checkpoint
    return replace(checkpoint, config=at_resolution(checkpoint.config, resolution))


def checkpoint_files(path: Path) -> CheckpointFiles:
    """The files that `load_vqgan` reads; no weights are read.

    Raises:
      InputError: a file is missing, it is not clear which one is meant, or the folder holds no VQGAN.
    """
    if not path.exists():
        raise InputError(f"VQGAN checkpoint {str(path)!r} does not exist; give a checkpoint file or its folder")
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    if path.suffix in TORCH_SUFFIXES or not config.is_file():
        return torch_files(path)
    settings = read_json(config)
    kind = settings.get("_class_name") or settings.get("model_type")
    for family in FAMILIES:
        if kind in family.kinds:
            return folder_files(folder, kind, family.weights, family.prefixes)
    known = ", ".join(repr(kind) for family in FAMILIES for kind in family.kinds)
    raise InputError(f"{config}: {quoted(kind)} is no VQGAN that can be loaded; give one of {known}")


def require_decoder(path: Path) -> None:
    """Refuse a checkpoint that only encodes, before anything is read or trained for it.

    Raises:
      InputError: it has no decoder, or its files are not there.
    """
    files = checkpoint_files(path)
    if not all(family.decodes(files) for family in FAMILIES if files.kind in family.kinds):
        raise InputError(
            f"VQGAN checkpoint {str(path)!r} has no decoder, so that a model trained on its codes could never draw; "
            "set vqgan.checkpoint to one that has, such as Chameleon's own vqgan.ckpt"
        )
