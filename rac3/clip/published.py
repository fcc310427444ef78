"""Published CLIPs and SigLIPs: a folder or a name on the Hugging Face hub, its family, and the model in it.

    Hugging Face: config.json                     model.safetensors | pytorch_model.bin, whole or in shards
    OpenCLIP    : open_clip_config.json           open_clip_model.safetensors | open_clip_pytorch_model.*
    both        : the tokenizer's files; Hugging Face's also preprocessor_config.json or processor_config.json

A family is one module of `families/` and an entry of `FAMILIES`.
"""

from pathlib import Path
from typing import Any

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.families import huggingface, naflex, openclip, siglip
from rac3.config import InputError, quoted
from rac3.tokens.text import SENTENCEPIECE
from rac3.weights.checkpoint_files import checkpoint_folder, content_identity, first_file, one_line, read_json
from rac3.weights.hub import why_not
from rac3.weights.weights_file import INDEX

FAMILIES = (huggingface.FAMILY, siglip.FAMILY, naflex.FAMILY, openclip.FAMILY)
"""Of those that claim a folder, the first whose weights are there loads it."""

SETTINGS = (
    *dict.fromkeys(name for family in FAMILIES for name in family.settings),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", SENTENCEPIECE),
)
"""All files but the weights."""


def load_clip(source: str) -> ClipCheckpoint:
    """The published CLIP or SigLIP in the folder `source`, or of that name on the Hugging Face hub.

    Raises:
      InputError: it can't be fetched, is of no known family, is damaged, or its parts do not fit together.
    """
    folder = checkpoint_folder("clip checkpoint", source)
    folder = _download(source) if folder is None else folder
    claiming = [family for family in FAMILIES if family.claims(folder)]
    if not claiming:
        raise InputError(f"clip checkpoint {str(folder)!r} {_unknown(folder)}")
    complete = [family for family in claiming if first_file(folder, family.weights)]
    with one_line(f"clip checkpoint {str(folder)!r}"):
        return (complete or claiming)[0].load(folder)


def _unknown(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return "has no config.json (or open_clip_config.json); give the folder of a whole checkpoint"
    known = ", ".join(repr(family.model_type) for family in FAMILIES if family.model_type)
    kind = read_json(folder / "config.json").get("model_type")
    return f"has model_type={quoted(kind)} in config.json; give one with {known}"


def checkpoint_identity(source: str) -> dict[str, Any]:
    """What an artifact made from a checkpoint depends on: its name; of a folder, also the content of its files.

    The folder must be there whenever a stage asks whether it is current.
    """
    folder = checkpoint_folder("clip checkpoint", source)
    if folder is None:
        return {"name": source}
    weights = [pattern for family in FAMILIES for name in family.weights for pattern in _with_shards(name)]
    files = sorted({path for pattern in (*SETTINGS, *weights) for path in folder.glob(pattern)})
    return {"folder": str(folder.resolve()), "files": content_identity(files)}


def _with_shards(weights: str) -> tuple[str, str]:
    """Patterns of the files that hold weights: `model.safetensors` and `model-*.safetensors`."""
    name = Path(weights)
    return weights, f"{name.stem}-*{name.suffix}"


def _download(name: str) -> Path:
    """The files of a checkpoint on the hub that `load_clip` reads, from the cache if they are there."""
    from huggingface_hub import snapshot_download

    offline = why_not()
    cached: Any = {} if offline is None else {"local_files_only": True}
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SETTINGS, f"*{INDEX}"], **cached))
        candidates = [weights for family in FAMILIES if family.claims(folder) for weights in family.weights]
        for weights in candidates:  # one format only: each holds all of the weights
            if not weights.endswith(INDEX):
                patterns = _with_shards(weights)
                snapshot_download(name, revision=folder.name, allow_patterns=list(patterns), **cached)
                if any(found for pattern in patterns for found in folder.glob(pattern)):
                    break
    except InputError:
        raise
    except Exception as error:  # of the hub's client and of the HTTP library below it
        reason = offline or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"clip checkpoint {name!r} cannot be fetched from the Hugging Face hub: {reason} "
            "(check the name and the network, or give a folder)"
        ) from error
    return folder
