"""The Transformer in a folder that others read: as Hugging Face's OPT, or in rac3's own form with its offsets.

config.json  model.safetensors, or shards and their index  text_tokenizer/

here  blocks/attention/qkv_kernel                     [layers, embed, 3, heads, head_dim]
piece blocks_3/attention/q_kernel                     [in, out]
OPT   model.decoder.layers.3.self_attn.q_proj.weight  [out, in]
rac3  blocks_3.attention.q_kernel                     [in, out]

OPT's table of positions starts with two rows that are none, and it has no offsets.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int, PyTree

from rac3.config import InputError
from rac3.model.transformer import Transformer
from rac3.tokens.text import TextTokenizer, Tokenizer
from rac3.tokens.vocabulary import EOD, NUM_SPECIALS, PAD, SPECIAL_NAMES, Vocabulary
from rac3.weights.checkpoint_files import checkpoint_folder, content_identity, first_file
from rac3.weights.port import Place, check_values, checked_places
from rac3.weights.settings import Settings, read_settings
from rac3.weights.weights_file import INDEX, read_weights, shards, write_weights

CONFIG, TOKENIZER = "config.json", "text_tokenizer"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OPT, OWN = "opt", "rac3"  # values of model_type
FIRST_POSITION = {OPT: 2, OWN: 0}  # the row of position 0
PADDING = 128  # OPT's table of ids has up to this many rows more than the tokenizer has ids

NAMES = (
    (r"^blocks_(\d+)/", r"layers.\1."),
    (r"attention/([qkv]|out)_", r"self_attn.\1_proj."),
    (r"attention_norm/", "self_attn_layer_norm."),
    (r"(mlp|final)_norm/", "final_layer_norm."),
    (r"mlp_in/", "fc1."),
    (r"mlp_out/", "fc2."),
    (r"^token_embedding$", "embed_tokens.weight"),
    (r"^position_embedding$", "embed_positions.weight"),
    (r"\.(kernel|scale)$", ".weight"),
)

Shapes = Mapping[str, tuple[int, ...]]  # of our parameters, by path


@dataclass(frozen=True)
class Piece:
    """A part of one of our parameters that files have under its own name.

    Attributes:
      path: of the parameter.
      index: where in it the piece is.
      shape: of the piece in files, but for transposition: [in, out] if it is a kernel.
    """

    path: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def pieces(shapes: Shapes) -> dict[str, Piece]:
    """All pieces by name: those of each layer, with q, k and v apart and the heads side by side."""
    found: dict[str, Piece] = {}
    for path, shape in shapes.items():
        block, _, rest = path.partition("/")
        if block != "blocks":
            found[path] = Piece(path, (), shape)
            continue
        width = math.prod(shape[-2:])
        for layer in range(shape[0]):
            for part, letter in enumerate("qkv" if "qkv" in rest else ""):
                name = f"blocks_{layer}/{rest.replace('qkv', letter)}"
                if rest.endswith("kernel"):
                    found[name] = Piece(path, (layer, slice(None), part), (shape[1], width))
                else:
                    found[name] = Piece(path, (layer, part), (width,))
            if rest.endswith("out_kernel"):
                found[f"blocks_{layer}/{rest}"] = Piece(path, (layer,), (math.prod(shape[1:3]), shape[3]))
            elif "qkv" not in rest:
                found[f"blocks_{layer}/{rest}"] = Piece(path, (layer,), shape[1:])
    return found


def place(model_type: str, name: str) -> Place:
    """Where a piece is in the files of a `model_type`."""
    if model_type == OWN:
        return Place(name.replace("/", "."))
    theirs = name
    for pattern, replacement in NAMES:
        theirs = re.sub(pattern, replacement, theirs)
    return Place(f"model.decoder.{theirs}", transposed=name.endswith("kernel"))


def parameters(params: PyTree) -> dict[str, Any]:
    """The parameters of a Transformer by path."""
    return flatten_dict(params["params"], sep="/")


# Out.


def model_type(model: Transformer) -> str:
    """The form that can hold the model."""
    return OWN if model.config.offset_embedding or model.config.rotary_offsets else OPT


def settings_of(model: Transformer, vocabulary: Vocabulary, more: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds.

    Args:
      more: what else the section `rac3` is to say.
    """
    config, kind = model.config, model_type(model)
    return {
        "architectures": ["OPTForCausalLM" if kind == OPT else "RaCM3Transformer"],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": config.embed,
        "word_embed_proj_dim": config.embed,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.mlp,
        "max_position_embeddings": model.max_positions,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": config.init_std,
        "bos_token_id": EOD,
        "eos_token_id": EOD,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
        "rac3": {
            "vocabulary": asdict(vocabulary),
            "specials": {name: number for number, name in enumerate(SPECIAL_NAMES)},
            "text_start": NUM_SPECIALS,
            "image_start": vocabulary.image_start,
            "mask_start": vocabulary.mask_start,
            "max_segment_tokens": model.max_segment_tokens,
            "rotary_offsets": config.rotary_offsets,
            **more,
        },
    }


def write_model(
    folder: Path, model: Transformer, params: PyTree, vocabulary: Vocabulary, more: Mapping[str, Any]
) -> int:
    """Writes weights and config.json; gives the bytes of the weights. The arguments are those of `settings_of`."""
    sizes = tensor_bytes(model, params)
    write_weights(folder, tensors(model, params), sizes)
    (folder / CONFIG).write_text(json.dumps(settings_of(model, vocabulary, more), indent=2) + "\n", encoding="utf-8")
    return sum(sizes.values())


def tensors(model: Transformer, params: PyTree) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Name and values of each tensor, one at a time, in float32."""
    kind, ours = model_type(model), parameters(params)
    for name, piece in pieces({path: leaf.shape for path, leaf in ours.items()}).items():
        values = np.asarray(ours[piece.path][piece.index], np.float32).reshape(piece.shape)
        if name == "position_embedding":
            values = np.pad(values, ((FIRST_POSITION[kind], 0), (0, 0)))
        at = place(kind, name)
        yield at.name, at.give(values)


def tensor_bytes(model: Transformer, params: PyTree) -> dict[str, int]:
    """The size of each tensor, in the order of `tensors`."""
    kind, ours = model_type(model), parameters(params)
    sizes = {}
    for name, piece in pieces({path: leaf.shape for path, leaf in ours.items()}).items():
        extra = FIRST_POSITION[kind] * piece.shape[1] if name == "position_embedding" else 0
        sizes[place(kind, name).name] = 4 * (math.prod(piece.shape) + extra)
    return sizes


# In.


def folder_of(source: str) -> Path:
    """The folder that `model.init_from` names.

    Raises:
      InputError: it is not there, or is a name on a hub.
    """
    folder = checkpoint_folder("model.init_from", source)
    if folder is None:
        raise InputError(
            f"model.init_from {source!r} is not a folder; give one with config.json and weights, such as "
            f"`hf download {source} --local-dir DIR` makes"
        )
    return folder


def identity(source: str) -> dict[str, Any]:
    """What a model that starts from a folder depends on: the content of its config and weights, wherever it is.

    Raises:
      InputError: there is no such folder, or it has no weights.
    """
    folder = folder_of(source)
    weights = _weights(folder)
    return content_identity([folder / CONFIG, *([weights, *shards(weights)] if _is_index(weights) else [weights])])


def _is_index(file: Path) -> bool:
    return file.name.endswith(INDEX)


def _weights(folder: Path) -> Path:
    weights = first_file(folder, WEIGHTS)
    if weights is None or not (folder / CONFIG).is_file():
        raise InputError(
            f"model.init_from {str(folder)!r} lacks {'weights' if weights is None else CONFIG}; give a folder with "
            f"{CONFIG} and {' or '.join(WEIGHTS)}"
        )
    return weights


def check_tokenizer(source: str, tokenizer: Tokenizer) -> None:
    """Refuses another text tokenizer than that of a folder, if the folder has one.

    Raises:
      InputError: names a token with another id.
    """
    folder = folder_of(source)
    folder = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
    if first_file(folder, ("tokenizer.json", "vocab.json")) is None:
        return
    ours = tokenizer.ids()
    for token, number in TextTokenizer(str(folder)).load().ids().items():
        if ours.get(token) != number:
            raise InputError(
                f"model.init_from: the tokenizer in {folder} has id {number} for {token!r}, but that of this config "
                f"has {ours.get(token)}; set --text.checkpoint {folder}"
            )


@dataclass(frozen=True)
class Pretrained:
    """The weights of a folder, and which rows of our tables they fill.

    Attributes:
      weights: by their names.
      places: of the pieces, among the weights.
      pieces: of our parameters.
      shapes: of our parameters.
      rows: for each table, the row of theirs that each of ours takes; -1 is none.
      note: what was found, in one line.
    """

    weights: Mapping[str, np.ndarray]
    places: Mapping[str, Place]
    pieces: Mapping[str, Piece]
    shapes: Shapes
    rows: Mapping[str, Int[np.ndarray, " rows"]]
    note: str

    def parameter(self, path: str) -> tuple[Float[np.ndarray, "..."], Bool[np.ndarray, " rows"] | None]:
        """The values of one of our parameters in float32, and the rows that have values; None is all of them."""
        shape = self.shapes[path]
        if path in self.rows:
            rows = self.rows[path]
            if path not in self.places:  # OPT has no offsets: with zeros, the model starts as that of OPT
                return np.zeros(shape, np.float32), None
            table = self.weights[self.places[path].name]
            values = np.where(rows[:, None] >= 0, np.asarray(table[np.maximum(rows, 0)], np.float32), np.float32(0))
            return values, None if (rows >= 0).all() else rows >= 0
        values = np.empty(shape, np.float32)
        for name, piece in self.pieces.items():
            if piece.path == path:
                at = self.places[name]
                part = at.take(self.weights[at.name], piece.shape)
                check_values(part, at.name, "model.init_from")
                values[piece.index] = part.reshape(values[piece.index].shape)
        return values, None

    def over(self, params: PyTree) -> PyTree:
        """The parameters with these values, each in its own sharding; rows without values stay as they are."""
        placed = {}
        for path, old in parameters(params).items():
            values, known = self.parameter(path)
            new = jax.make_array_from_callback(old.shape, old.sharding, values.__getitem__)
            placed[path] = new if known is None else _rows(known, new, old)
        paths, structure = jax.tree_util.tree_flatten_with_path(params["params"])
        ordered = ["/".join(key.key for key in path) for path, _ in paths]
        return {"params": jax.tree.unflatten(structure, [placed[path] for path in ordered])}


def _rows(known: Bool[np.ndarray, " rows"], new: Array, old: Array) -> Array:
    choose = jax.jit(lambda known, new, old: jnp.where(known[:, None], new, old), out_shardings=old.sharding)
    return choose(known, new, old)


def read_pretrained(source: str, model: Transformer, shapes: Shapes, vocabulary: Vocabulary) -> Pretrained:
    """The weights that a model starts from: of an OPT, or of a model that rac3 exported.

    OPT's ids are ours of text, and its end of text is our `<eod>`; all other rows are new. Positions and offsets
    beyond those of the folder are new; further ones are left out.

    Args:
      shapes: of the parameters of `model`, by path.

    Raises:
      InputError: another architecture, other sizes or another vocabulary; a weight is missing, has another shape, or
        has no place in the model.
    """
    folder = folder_of(source)
    file = _weights(folder)
    settings = read_settings(folder / CONFIG)
    kind = _check_sizes(settings, model)
    own = settings.part("rac3") if "rac3" in settings.values else None
    vocab_size = settings.get("vocab_size", int)
    positions = settings.get("max_position_embeddings", int)
    longest = own.get("max_segment_tokens", int) if own is not None else 0
    _check_rotary(settings, own, model)
    rows = {
        "token_embedding": _token_rows(settings, own, vocabulary, vocab_size, model.vocab_size),
        "position_embedding": _first_rows(positions, model.max_positions, FIRST_POSITION[kind]),
    }
    theirs = {
        **shapes,
        "token_embedding": (vocab_size, model.config.embed),
        "position_embedding": (positions + FIRST_POSITION[kind], model.config.embed),
    }
    if "offset_embedding" in shapes:
        rows["offset_embedding"] = _first_rows(longest + 1, model.max_segment_tokens + 1, 0)
        theirs["offset_embedding"] = (longest + 1, model.config.embed)
        if kind == OPT:
            del theirs["offset_embedding"]
    cut = pieces(theirs)
    weights = _named(file, read_weights(file))
    places = checked_places(
        {name: piece.shape for name, piece in cut.items()},
        weights,
        lambda name: place(kind, name),
        where=f"weights {str(file)!r}",
        fix="give the weights and the config of one model, of the sizes of this one",
    )
    ids, places_kept = int((rows["token_embedding"] >= 0).sum()), min(positions, model.max_positions)
    note = f"{ids} of {model.vocab_size} ids and {places_kept} of {model.max_positions} positions from {folder}"
    return Pretrained(weights, places, cut, shapes, rows, note)


def _check_sizes(settings: Settings, model: Transformer) -> str:
    """The model_type of a folder with the architecture and the sizes of `model`."""
    kind = settings.get("model_type", str)
    if kind not in FIRST_POSITION:
        raise InputError(
            f"{settings.file}: model_type={kind!r} is not supported by model.init_from; give an OPT, or a folder that "
            "`rac3 export` made"
        )
    settings.require(
        activation_function="relu",
        do_layer_norm_before=True,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        tie_word_embeddings=True,
        _remove_final_layer_norm=False,
    )
    config = model.config
    for name, field in (
        ("hidden_size", "embed"),
        ("word_embed_proj_dim", "embed"),
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_heads"),
        ("ffn_dim", "mlp"),
    ):
        wanted = getattr(config, field)
        found = settings.get(name, int, config.embed if name == "word_embed_proj_dim" else None)
        if found != wanted:
            raise InputError(
                f"{settings.file}: {name}={found}, but model.{field}={wanted}; set --model.{field.replace('_', '-')} "
                f"{found}, or start from another model"
            )
    return kind


def _check_rotary(settings: Settings, own: Settings | None, model: Transformer) -> None:
    """Refuses weights whose queries and keys are turned otherwise than here."""
    ours = model.config.rotary_offsets
    theirs = own is not None and own.get("rotary_offsets", bool, False)
    if theirs != ours:
        raise InputError(
            f"{settings.file}: rotary_offsets={theirs}, but model.rotary_offsets={ours}; set "
            f"--model.{'' if theirs else 'no-'}rotary-offsets, or start from another model"
        )
    longest = own.get("max_segment_tokens", int) if own is not None and theirs else model.max_segment_tokens
    if longest != model.max_segment_tokens:
        raise InputError(
            f"{settings.file}: max_segment_tokens={longest}, but {model.max_segment_tokens} here, which rotary offsets "
            "depend on; use images of as many tokens, and the same max_text_tokens"
        )


def _token_rows(
    settings: Settings, own: Settings | None, vocabulary: Vocabulary, theirs: int, ours: int
) -> Int[np.ndarray, " rows"]:
    """The row of their table of ids that each of ours takes; -1 is none."""
    if own is not None:
        stored = own.part("vocabulary").values
        if stored != asdict(vocabulary):
            raise InputError(
                f"{settings.file}: the vocabulary is {_sizes(stored)}, but this config has "
                f"{_sizes(asdict(vocabulary))}; use the text tokenizer and the VQGAN that the model was trained with"
            )
        return np.arange(ours)
    text = vocabulary.text_size
    if not text <= theirs < text + PADDING:
        raise InputError(
            f"{settings.file}: vocab_size={theirs} does not fit the {text} ids of the text tokenizer; set "
            f"--text.checkpoint {settings.file.parent}"
        )
    rows = np.full(ours, -1)
    rows[EOD] = settings.get("eos_token_id", int, 2)
    rows[NUM_SPECIALS : NUM_SPECIALS + text] = np.arange(text)
    return rows


def _sizes(vocabulary: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {size}" for name, size in vocabulary.items())


def _first_rows(theirs: int, ours: int, start: int) -> Int[np.ndarray, " rows"]:
    rows = np.arange(ours)
    return np.where(rows < theirs, rows + start, -1)


def _named(file: Path, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights by the names of OPTForCausalLM, whose output table must be that of its ids.

    Raises:
      InputError: it is another one.
    """
    named = {f"model.{name}" if name.startswith("decoder.") else name: each for name, each in weights.items()}
    table, output = named.get("model.decoder.embed_tokens.weight"), named.get("lm_head.weight")
    if output is not None and table is not None:
        if not np.array_equal(table, output):
            raise InputError(
                f"weights {str(file)!r}: lm_head.weight differs from embed_tokens.weight, but our output table is that "
                "of the ids; use a model with tied embeddings"
            )
        del named["lm_head.weight"]
    return named
