"""Sampling: how the next id is drawn from the logits.

All that is here are pure functions of logits. They apply in this order:

    streams -> one distribution   (the mean of an ensemble; guidance; contrast)
    copying                       (`rac3.generation.copying`)
    processors                    (a user's own)
    temperature -> top_k -> top_p -> draw

A `Sampling` is both a config and a pytree: its numbers are leaves, and what is switched on is its structure. A jitted
function of it compiles once for each structure, and samplings of one structure stack into arrays of one batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Bool, Float, Int, Key

from rac3.config import InputError
from rac3.generation.copying import Copying
from rac3.generation.step import Processor, Step

LARGEST = 1e30  # logits are clipped to this, either way, so that sums and differences of them stay finite
FLOAT_BITS = 30  # floats from 0 to 1 are in the order of their bits, read as integers below 2**30


Without = Literal["text", "documents"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: away from what the model would draw without its condition.

        logits = logits_without + scale * (logits_with - logits_without)             (CM3Leon, arXiv 2309.02591)

    Attributes:
      scale: 1 is no guidance; images are drawn well at 2 to 6.
      without: what the second prompt lacks: the text, with a mask in its place, as in CM3Leon; or the documents.
    """

    scale: float = 1.0
    without: Without = "text"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InputError(f"sampling.guidance.scale={self.scale} is not a finite number; use 1 to 6")


@dataclass(frozen=True)
class Contrast:
    """Contrastive decoding with top-k: ids that the condition makes more probable, among those that are plausible.

        score(id) = log p_with(id) - log p_without(id)   if p_with(id) >= alpha * (k-th largest p_with), else -inf

    (CM3Leon, arXiv 2309.02591; with k = 1 it is contrastive decoding, arXiv 2210.15097)

    Attributes:
      k: 0 is no contrast.
      without: as in `Guidance`.
    """

    k: int = 0
    alpha: float = 0.6
    without: Without = "text"

    def __post_init__(self) -> None:
        if self.k < 0:
            raise InputError(f"sampling.contrast.k={self.k} is below 0; use 0 for none, or 1 and more")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"sampling.contrast.alpha={self.alpha} is outside 0 to 1; use 0.6, say")


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    Attributes:
      temperature: of the softmax; 0 takes the most probable id.
      top_p: draw from the smallest set of ids whose probabilities sum to at least this (arXiv 1904.09751); 1 keeps all
        ids. Of equal ids, the smaller ones are kept.
      top_k: draw from this many of the most probable ids; 0 keeps all ids.
      guidance, contrast: compare the prompt with one that lacks its text or its documents, which doubles the work; at
        most one of the two.
      copying: from the documents in the prompt.
      processors: a user's own, applied in this order.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: Guidance = field(default_factory=Guidance)
    contrast: Contrast = field(default_factory=Contrast)
    copying: Copying = field(default_factory=Copying)
    processors: Annotated[tuple[Processor, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()  # not on the command line

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"sampling.temperature={self.temperature} is not a number from 0; use 0 for the best id, or 1"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p={self.top_p} is outside (0, 1]; use 1 to keep all ids")
        if self.top_k < 0:
            raise InputError(f"sampling.top_k={self.top_k} is below 0; use 0 to keep all ids")
        if self.guidance.scale != 1 and self.contrast.k:
            raise InputError(
                f"sampling.guidance.scale={self.guidance.scale} and sampling.contrast.k={self.contrast.k} exclude each "
                "other; use scale 1, or k 0"
            )

    @property
    def without(self) -> Without | None:
        """What the prompts that are compared with lack; None if there are none."""
        if self.guidance.scale != 1:
            return self.guidance.without
        return self.contrast.without if self.contrast.k else None


def _register(kind: type, static: Sequence[str], off: Mapping[str, tuple[str, float]]) -> None:
    """Makes a config a pytree: its fields are leaves, but for `static` ones, and but for what is off.

    Args:
      off: for a field, its number ("" is the field itself) and the value at which it is off: None in the pytree.
    """
    names = [each.name for each in fields(kind) if each.name not in static]

    def is_off(name: str, value: Any) -> bool:
        if name not in off or value is None:
            return value is None
        number = getattr(value, off[name][0]) if off[name][0] else value
        return isinstance(number, int | float) and number == off[name][1]  # arrays are on

    def flatten(config: Any) -> tuple[list[Any], tuple[Any, ...]]:
        values = [(name, getattr(config, name)) for name in names]
        leaves = [None if is_off(name, value) else value for name, value in values]
        return leaves, tuple(getattr(config, name) for name in static)

    def unflatten(aux: tuple[Any, ...], leaves: Sequence[Any]) -> Any:
        config: Any = object.__new__(kind)  # no checks: the leaves of a pytree may be anything
        for name, leaf in (*zip(names, leaves, strict=True), *zip(static, aux, strict=True)):
            object.__setattr__(config, name, leaf)
        return config

    jax.tree_util.register_pytree_node(kind, flatten, unflatten)


_register(Guidance, ["without"], {})
_register(Contrast, ["without"], {})
_register(Copying, [], {})
_register(
    Sampling,
    ["processors"],
    {
        "top_p": ("", 1.0),
        "top_k": ("", 0),
        "guidance": ("scale", 1.0),
        "contrast": ("k", 0),
        "copying": ("weight", 0.0),
    },
)


def stack(samplings: Sequence[Sampling]) -> Sampling:
    """Samplings of one structure (`jax.tree.structure`) as one, whose numbers are float32 arrays [requests]."""
    return jax.tree.map(lambda *numbers: jnp.asarray(numbers, jnp.float32), *samplings)


def sample(
    sampling: Sampling,
    logits: Float[Array, "requests streams samples vocab"],
    allowed: Bool[Array, "requests samples vocab"],
    step: Step,
    keys: Key[Array, "requests samples"],
) -> tuple[Int[Array, "requests samples"], Float[Array, "requests samples"]]:
    """An id for each sample of each request, and its log probability.

    The log probability is in nats, among the allowed ids, at temperature 1: that of the model, or of the ensemble,
    mixed with what it copies, but without guidance and processors. An infinite logit is a very large one. The log
    probability is NaN, for the caller to refuse, if an allowed id has a logit that is NaN (the parameters are damaged),
    or if a processor leaves no id.

    Args:
      sampling: its numbers are arrays [requests], as from `stack`. What is off is None.
      logits: of each stream of a request. With guidance or contrast, the streams that lack their text or documents come
        last: as many as the others without the text, one without the documents.
      keys: one for each sample, so that a draw does not depend on the rest of the batch.
    """
    guidance = sampling.guidance or sampling.contrast
    alone, combined = combine(guidance, logits, allowed)
    if sampling.copying is not None:
        copied = sampling.copying(combined, step)
        alone = sampling.copying(alone, step) if guidance else copied
        combined = copied
    for processor in sampling.processors:
        combined = jax.nn.log_softmax(jnp.where(allowed, processor(combined, step), -jnp.inf))
    damaged = jnp.any(jnp.isnan(logits) & allowed[:, None], axis=(1, 3)) | jnp.all(jnp.isnan(combined), axis=-1)
    temperature = _by_request(sampling.temperature)
    scaled = combined - jnp.max(combined, axis=-1, keepdims=True)
    scaled = scaled / jnp.where(temperature > 0, temperature, 1)
    if sampling.top_k is not None:
        scaled = jnp.where(top_k(jax.nn.softmax(scaled), _by_request(sampling.top_k)), scaled, -jnp.inf)
    if sampling.top_p is not None:
        scaled = jnp.where(top_p(jax.nn.softmax(scaled), _by_request(sampling.top_p)), scaled, -jnp.inf)
    best = jnp.argmax(combined, axis=-1)
    drawn = jax.lax.cond(  # no noise is made where no request needs it
        jnp.any(temperature > 0), lambda: jax.vmap(jax.vmap(jax.random.categorical))(keys, scaled), lambda: best
    )
    ids = jnp.where(temperature[..., 0] > 0, drawn, best)
    log_probs = jnp.take_along_axis(alone, ids[..., None], axis=-1)[..., 0]
    return ids, jnp.where(damaged, jnp.nan, log_probs)


def combine(
    guidance: Guidance | Contrast | None,
    logits: Float[Array, "requests streams samples vocab"],
    allowed: Bool[Array, "requests samples vocab"],
) -> tuple[Float[Array, "requests samples vocab"], Float[Array, "requests samples vocab"]]:
    """The streams as one distribution: log probabilities without guidance, and with it; -inf where not allowed.

    The distribution of an ensemble is the mean of the probabilities of its streams (paper, section 5.4). A logit that
    is NaN counts as a very small one.
    """
    finite = jnp.clip(jnp.where(jnp.isnan(logits), -LARGEST, logits), -LARGEST, LARGEST)
    log_probs = jax.nn.log_softmax(jnp.where(allowed[:, None], finite, -jnp.inf))
    if guidance is None:
        mean = _mean(log_probs)
        return mean, mean
    streams = logits.shape[1]
    conditioned = streams // 2 if guidance.without == "text" else streams - 1
    mean, without = _mean(log_probs[:, :conditioned]), _mean(log_probs[:, conditioned:])
    contrast = jnp.where(allowed, mean - without, -jnp.inf)
    if isinstance(guidance, Guidance):
        guided = without + _by_request(guidance.scale) * contrast
    else:
        plausible = _by_request(guidance.alpha) * _kth_largest(jnp.exp(mean), _by_request(guidance.k))
        guided = jnp.where(jnp.exp(mean) >= plausible, contrast, -jnp.inf)
    return mean, jax.nn.log_softmax(jnp.where(allowed, guided, -jnp.inf))


def top_k(
    probs: Float[Array, "requests samples vocab"], k: Float[Array, "#requests 1 1"]
) -> Bool[Array, "requests samples vocab"]:
    """The `k` most probable ids; of equal ones, the smaller ids."""
    return _smallest_set(probs, jnp.ones_like(probs), k)


def top_p(
    probs: Float[Array, "requests samples vocab"], p: Float[Array, "#requests 1 1"]
) -> Bool[Array, "requests samples vocab"]:
    """The nucleus: the fewest ids whose probabilities sum to at least `p`; of equal ones, the smaller ids.

    (arXiv 1904.09751, eq. 2)
    """
    return _smallest_set(probs, probs, p)


def _smallest_set(probs: Array, weights: Array, target: Array) -> Array:
    """The first ids, by falling probability and then by id, whose weights sum to `target`; all, if they never do."""
    least = _threshold(probs, weights, target)
    above = probs > least
    tied = jnp.where(probs == least, weights, 0)
    missing = target - jnp.sum(jnp.where(above, weights, 0), axis=-1, keepdims=True)
    return above | ((probs == least) & (jnp.cumsum(tied, axis=-1) - tied < missing))


def _kth_largest(probs: Array, k: Array) -> Array:
    """The k-th largest probability."""
    return _threshold(probs, jnp.ones_like(probs), k)


def _threshold(probs: Array, weights: Array, target: Array) -> Array:
    """The largest number such that the weights of the ids of at least this probability sum to `target`, or else 0.

    Found bit by bit: a sort of the vocabulary takes many times as long.
    """

    def narrow(place: int | Array, found: Array) -> Array:
        tried = found | (1 << (FLOAT_BITS - 1 - place))
        least = jax.lax.bitcast_convert_type(tried, jnp.float32)
        reached = jnp.sum(jnp.where(probs >= least, weights, 0), axis=-1, keepdims=True) >= target
        return jnp.where(reached, tried, found)

    bits = jax.lax.fori_loop(0, FLOAT_BITS, narrow, jnp.zeros((*probs.shape[:-1], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _mean(log_probs: Float[Array, "requests streams samples vocab"]) -> Float[Array, "requests samples vocab"]:
    """The logarithm of the mean probability over streams."""
    if log_probs.shape[1] == 1:
        return log_probs[:, 0]
    return jax.nn.logsumexp(log_probs, axis=1) - jnp.log(log_probs.shape[1])


def _by_request(number: float | int | Array) -> Float[Array, "#requests 1 1"]:
    return jnp.asarray(number, jnp.float32).reshape(-1, 1, 1)
