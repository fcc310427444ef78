"""The weights of published CLIPs and SigLIPs: files to named arrays, and these to the parameters of our modules.

Hugging Face: text_model.encoder.layers.0.self_attn.q_proj.weight  [out, in]
OpenCLIP    : transformer.resblocks.0.attn.in_proj_weight          [3 out, in], q, k and v in one
both        : all names may begin with `module.`, as distributed training in torch leaves them
here        : text_model/layers_0/self_attn/q_proj/kernel          [in, out]
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rac3.clip.model import CLIP
from rac3.clip.siglip import SigLIP
from rac3.config import InputError
from rac3.weights.checkpoint_files import read_json, read_safetensors
from rac3.weights.torch_file import read_state_dict

DISTRIBUTED = "module."  # what torch's DistributedDataParallel puts before every name
BUFFERS = ("position_ids", "attn_mask")  # old files hold these beside the weights; they follow from the config


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a file.

    Attributes:
      name: of the array in the file.
      part: 0, 1 or 2 if it is that third of the rows; None if it is the whole array.
      turned: a kernel whose outputs come before its inputs in the file, as in torch's layers.
    """

    name: str
    turned: bool = False
    part: int | None = None


def hugging_face(path: str) -> Place:
    """The place of a parameter in a file of Hugging Face's `CLIPModel` or `SiglipModel`.

    The attention of SigLIP's pooling head is torch's own module, which has q, k and v in one.
    """
    if fused := re.search(r"^vision_model/head/attention/([qkv])_proj/(kernel|bias)$", path):
        name = f"vision_model.head.attention.in_proj_{'weight' if fused[2] == 'kernel' else 'bias'}"
        return Place(name, turned=fused[2] == "kernel", part="qkv".index(fused[1]))
    name = re.sub(r"layers_(\d+)", r"encoder.layers.\1", path.replace("/", "."))
    name = re.sub(r"(token_embedding|position_embedding|patch_embedding|class_embedding)", r"embeddings.\1", name)
    name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
    return Place(f"{name}.weight" if name.endswith("position_embedding") else name, turned=path.endswith("kernel"))


_OPEN_CLIP = (
    (r"^text_model/layers_(\d+)/", r"transformer.resblocks.\1."),
    (r"^vision_model/layers_(\d+)/", r"visual.transformer.resblocks.\1."),
    (r"layer_norm(\d)/", r"ln_\1."),
    (r"mlp/fc1/", "mlp.c_fc."),
    (r"mlp/fc2/", "mlp.c_proj."),
    (r"self_attn/out_proj/", "attn.out_proj."),
    (r"^text_model/token_embedding/", "token_embedding."),
    (r"^text_model/position_embedding", "positional_embedding"),
    (r"^text_model/final_layer_norm/", "ln_final."),
    (r"^vision_model/class_embedding", "visual.class_embedding"),
    (r"^vision_model/position_embedding", "visual.positional_embedding"),
    (r"^vision_model/patch_embedding/", "visual.conv1."),
    (r"^vision_model/pre_layrnorm/", "visual.ln_pre."),
    (r"^vision_model/post_layernorm/", "visual.ln_post."),
    (r"self_attn/[qkv]_proj/kernel$", "attn.in_proj_weight"),
    (r"self_attn/[qkv]_proj/bias$", "attn.in_proj_bias"),
    (r"^text_projection/kernel$", "text_projection"),
    (r"^visual_projection/kernel$", "visual.proj"),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)


def open_clip(path: str) -> Place:
    """The place of a parameter in a file of OpenCLIP's `CLIP`, whose two projections are bare matrices."""
    name = path
    for pattern, replacement in _OPEN_CLIP:
        name = re.sub(pattern, replacement, name)
    fused = re.search(r"([qkv])_proj/", path)
    turned = path.endswith("kernel") and "projection" not in path
    return Place(name, turned, part="qkv".index(fused[1]) if fused else None)


def read_weights(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors or `torch.save` file, or of all the files that a `.index.json` names.

    Raises:
      InputError: a file is missing, cut short, or something else.
    """
    if file.name.endswith(".index.json"):
        names = sorted(set(_index(file).values()))
        parts = [_read_one(file.parent / Path(part).name) for part in names]
        return {name: array for part in parts for name, array in part.items()}
    weights = _read_one(file)
    if weights and all(name.startswith(DISTRIBUTED) for name in weights):
        return {name.removeprefix(DISTRIBUTED): array for name, array in weights.items()}
    return weights


def _index(file: Path) -> dict[str, str]:
    files = read_json(file).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"weights {str(file)!r} are no index of weight files; download it again")
    return {str(name): str(part) for name, part in files.items()}


def _read_one(file: Path) -> dict[str, np.ndarray]:
    return read_safetensors(file) if file.suffix == ".safetensors" else read_state_dict(file)


def clip_params(
    towers: CLIP | SigLIP, weights: Mapping[str, np.ndarray], place: Callable[[str], Place], where: str
) -> dict[str, Any]:
    """The parameters of the towers in float32, nested, from the arrays of a file.

    Args:
      place: `hugging_face` or `open_clip`.
      where: names the checkpoint in messages.

    Raises:
      InputError: a weight is missing, left over, of another shape than the config asks for, or not of floats.
    """
    shapes = _shapes(towers)
    places = {path: place(path) for path in shapes}
    wanted = list(dict.fromkeys(found.name for found in places.values()))
    _refuse(where, [name for name in wanted if name not in weights], "lacks weights of this config")
    given = [name for name in weights if not name.endswith(BUFFERS)]
    _refuse(where, sorted(set(given) - set(wanted)), "has weights that this config has no place for")
    flat = {path: _parameter(weights[at.name], at, shapes[path], where) for path, at in places.items()}
    return unflatten_dict(flat, sep="/")


def square_patches(
    weights: Mapping[str, np.ndarray], patch_size: int, num_patches: int, side: int, where: str
) -> dict[str, np.ndarray]:
    """A NaFlex checkpoint's weights as those of a `SiglipModel` whose images are `side` x `side` patches.

    The patch embedding is linear on flattened patches (row, column, channel) and becomes a convolution. The positions,
    a square grid of `num_patches`, are resized as `Siglip2VisionEmbeddings` does: bilinear, antialiased, in float32.

    Raises:
      InputError: `num_patches` is no square number, or there are other than that many positions.
    """
    weights = dict(weights)
    name = "vision_model.embeddings.patch_embedding.weight"
    flat = weights.get(name)
    if flat is not None and flat.ndim == 2 and flat.shape[1] % patch_size**2 == 0:
        weights[name] = flat.reshape(len(flat), patch_size, patch_size, -1).transpose(0, 3, 1, 2)
    name, grid = "vision_model.embeddings.position_embedding.weight", math.isqrt(num_patches)
    if grid**2 != num_patches or (name in weights and len(weights[name]) != num_patches):
        raise InputError(
            f"{where}: num_patches={num_patches} is not a square number, or not the number of positions in the "
            "weights; give config and weights of the same model"
        )
    if name in weights and side != grid:
        positions = jnp.asarray(weights[name], jnp.float32).reshape(grid, grid, -1)
        resized = jax.image.resize(positions, (side, side, positions.shape[-1]), "bilinear", antialias=True)
        weights[name] = np.asarray(resized).reshape(side * side, -1)
    return weights


def _shapes(towers: CLIP | SigLIP) -> dict[str, tuple[int, ...]]:
    text, vision = towers.config.text_config, towers.config.vision_config
    ids = jnp.zeros((1, text.max_position_embeddings), jnp.int32)
    pixels = jnp.zeros((1, vision.image_size, vision.image_size, vision.num_channels))
    shapes = jax.eval_shape(towers.init, jax.random.key(0), ids, jnp.ones(ids.shape, bool), pixels)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}


def _refuse(where: str, names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(f"{where} {what}: {names[0]!r}{more}; give config and weights of the same model")


def _parameter(array: np.ndarray, place: Place, shape: tuple[int, ...], where: str) -> np.ndarray:
    """One parameter of `shape` from the array at its place."""
    axes = range(len(shape))
    order = (axes[-1], axes[-2], *axes[:-2]) if place.turned else tuple(axes)  # of the file: outputs, inputs, the rest
    expected = tuple(shape[axis] for axis in order)
    if place.part is not None:
        expected = (3 * expected[0], *expected[1:])
    if array.shape != expected:
        raise InputError(
            f"{where}: weight {place.name!r} has shape {array.shape}, but its config asks for {expected}; "
            "give config and weights of the same model"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(
            f"{where}: weight {place.name!r} is of {array.dtype}, not of floats; give weights that are not quantized"
        )
    if place.part is not None:
        array = np.split(array, 3)[place.part]
    return np.array(array.transpose(np.argsort(order)), np.float32, order="C")
