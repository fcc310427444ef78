"""The weights of a peer, under its names and in its layout, as the parameters of our modules.

here         text_model/layers_0/mlp/fc1/kernel           [in, out]
transformers text_model.encoder.layers.0.mlp.fc1.weight   [out, in]                  Place(name, transposed=True)

here         encoder/conv_in/kernel                       [height, width, in, out]
taming       encoder.conv_in.weight                       [out, in, height, width]   Place(name, transposed=True)

here         text_model/layers_0/self_attn/k_proj/kernel  [in, out]
OpenCLIP     transformer.resblocks.0.attn.in_proj_weight  [3 out, in]        Place(name, transposed=True, part=1)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rac3.config import InputError, quoted

ONE_MODEL = "give the weights and the config of one model"

Shape = tuple[int, ...]
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Place:
    """Where one of our parameters is among a peer's weights.

    Attributes:
      name: of the weight.
      transposed: a kernel with its outputs, then its inputs first, as in torch's layers; ours has them last.
      part: 0, 1 or 2 if the parameter is that third of the weight's rows; None if it is the whole weight.
    """

    name: str
    transposed: bool = False
    part: int | None = None

    def shape(self, ours: Shape) -> Shape:
        """The shape of the weight that holds a parameter of the shape `ours`."""
        theirs = (ours[-1], ours[-2], *ours[:-2]) if self.transposed else ours
        return theirs if self.part is None else (3 * theirs[0], *theirs[1:])

    def take(self, weight: np.ndarray, ours: Shape) -> np.ndarray:
        """The parameter, in float32 and contiguous."""
        weight = weight.reshape(self.shape(ours))
        if self.part is not None:
            weight = np.split(weight, 3)[self.part]
        if self.transposed:
            weight = weight.transpose(*range(2, weight.ndim), 1, 0)
        return np.array(weight, np.float32, order="C")

    def give(self, ours: np.ndarray) -> np.ndarray:
        """The weight that holds a parameter, contiguous: the inverse of `take` where the parameter is all of it."""
        if self.transposed:
            ours = ours.transpose(ours.ndim - 1, ours.ndim - 2, *range(ours.ndim - 2))
        return np.ascontiguousarray(ours)


def port(
    params: Mapping[str, Any],
    weights: Weights,
    place: Callable[[str], Place],
    *,
    where: str,
    ignored: str = "",
    fix: str = ONE_MODEL,
) -> dict[str, Any]:
    """Our parameters, nested and in float32, from a peer's weights.

    A linear layer [out, in] and a convolution of one pixel [out, in, 1, 1] are taken for each other.

    Args:
      params: ours, nested dicts down to anything with a shape, such as `jax.eval_shape(model.init, ...)["params"]`.
      place: the path of a parameter, such as `encoder/conv_in/kernel`, to its place among the weights.
      where: names the weights in messages: "weights 'vqgan.ckpt'".
      ignored: a regular expression for the whole name of a weight that we may leave out, such as a discriminator's.
      fix: what to do if the weights do not fit.

    Raises:
      InputError: a weight is missing, or nothing asks for it, or it has another shape, or it is not of floats, or its
        values can't be those of a trained model.
    """
    ours: dict[str, Shape] = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    places = checked_places(ours, weights, place, where=where, ignored=ignored, fix=fix)
    taken = {path: at.take(weights[at.name], ours[path]) for path, at in places.items()}
    for path, at in places.items():
        check_values(taken[path], at.name, where)
    return unflatten_dict(taken, sep="/")


def check_values(values: np.ndarray, name: str, where: str) -> None:
    """Refuses what an interrupted download or a training that diverged leaves: NaN, infinity, a matrix of zeros.

    Raises:
      InputError: names the weight.
    """
    wrong = values.size - np.count_nonzero(np.isfinite(values))
    if wrong:
        raise InputError(
            f"{where}: {wrong:,} of the {values.size:,} values of {name!r} are NaN or infinite; download them "
            "again, or take an earlier checkpoint"
        )
    if values.ndim > 1 and values.size > 1 and not values.any():
        raise InputError(f"{where}: all {values.size:,} values of {name!r} are 0; download them again")


def checked_places(
    ours: Mapping[str, Shape],
    weights: Weights,
    place: Callable[[str], Place],
    *,
    where: str,
    ignored: str = "",
    fix: str = ONE_MODEL,
) -> dict[str, Place]:
    """The place of each of our parameters among a peer's weights, which fit; arguments and errors as of `port`.

    Args:
      ours: the shapes of our parameters, by path.
    """
    places = {path: place(path) for path in ours}
    wanted = {at.name: at.shape(ours[path]) for path, at in places.items()}
    if missing := [name for name in wanted if name not in weights]:
        raise InputError(f"{where} lack {quoted(missing[0])} of shape {wanted[missing[0]]}{_more(missing)}; {fix}")
    if surplus := [name for name in weights if name not in wanted and not re.fullmatch(ignored, name)]:
        raise InputError(
            f"{where} have {quoted(surplus[0])} of shape {weights[surplus[0]].shape}{_more(surplus)}, which the "
            f"model has no place for; {fix}"
        )
    for name, shape in wanted.items():
        weight = weights[name]
        if _linear(weight.shape) != _linear(shape):
            raise InputError(f"{where}: {name!r} has shape {weight.shape}, but the model asks for {shape}; {fix}")
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise InputError(
                f"{where}: {name!r} is of {weight.dtype}, not of floats; give weights that are not quantized"
            )
    return places


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _linear(shape: Shape) -> Shape:
    """The shape of a convolution of one pixel as that of a linear layer; any other as it is."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
