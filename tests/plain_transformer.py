"""The Transformer in plain NumPy and float64, one group at a time: what the model is tested against."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rac3.model.transformer import Transformer

Params = Mapping[str, Any]


def random_params(model: Transformer, seed: int = 0, std: float = 0.2) -> dict[str, Any]:
    """Parameters that are all random, biases and scales included: new ones are zeros and ones, which hide mistakes."""
    rng, ids = np.random.default_rng(seed), jnp.zeros((1, 2), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids, ids))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def plain_logits(
    params: Params,
    num_heads: int,
    tokens: np.ndarray,
    offsets: np.ndarray | None = None,
    turns: np.ndarray | None = None,
) -> np.ndarray:
    """Scores over the vocabulary at each place of one group, `[seq, vocab]`.

    Args:
      offsets: of a model with a table of them.
      turns: of a model with rotary offsets, the angles of the pairs of dimensions at each place, [seq, pairs].
    """
    weights = jax.tree.map(np.float64, params["params"])
    seq = len(tokens)
    x = weights["token_embedding"][tokens] + weights["position_embedding"][np.arange(seq)]
    if offsets is not None:
        x = x + weights["offset_embedding"][offsets]
    blocks = weights["blocks"]
    for layer in range(len(blocks["mlp_in"]["bias"])):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        x = x + _attention(block["attention"], num_heads, _layer_norm(block["attention_norm"], x), turns)
        hidden = _layer_norm(block["mlp_norm"], x) @ block["mlp_in"]["kernel"] + block["mlp_in"]["bias"]
        x = x + np.maximum(hidden, 0) @ block["mlp_out"]["kernel"] + block["mlp_out"]["bias"]
    return _layer_norm(weights["final_norm"], x) @ weights["token_embedding"].T


def plain_nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p(target) at each place."""
    highest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
    return log_sum - logits[np.arange(len(targets)), targets]


def _layer_norm(weights: Params, x: np.ndarray) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * weights["scale"] + weights["bias"]


def plain_turns(offsets: np.ndarray, head_dim: int, longest: int) -> np.ndarray:
    """The angles of rotary offsets: 3 radians a place for the first pair of dimensions, 3 / longest for the last."""
    pairs = head_dim // 4
    return offsets[:, None] * np.geomspace(3, 3 / longest, pairs)


def _turned(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """As complex numbers: of p pairs, dimension n is the real part of pair n, and dimension p + n the imaginary one."""
    pairs = turns.shape[1]
    numbers = (x[:, :pairs] + 1j * x[:, pairs : 2 * pairs]) * np.exp(1j * turns)
    return np.concatenate([numbers.real, numbers.imag, x[:, 2 * pairs :]], axis=1)


def _attention(weights: Params, num_heads: int, x: np.ndarray, turns: np.ndarray | None) -> np.ndarray:
    out = weights["out_bias"].copy()
    for head in range(num_heads):
        query, key, value = (
            x @ weights["qkv_kernel"][:, part, head] + weights["qkv_bias"][part, head] for part in range(3)
        )
        if turns is not None:
            query, key = _turned(query, turns), _turned(key, turns)
        scores = query @ key.T / np.sqrt(query.shape[-1])
        scores[np.triu_indices(len(x), 1)] = -np.inf
        attended = np.exp(scores - scores.max(-1, keepdims=True))
        out = out + attended / attended.sum(-1, keepdims=True) @ value @ weights["out_kernel"][head]
    return out
