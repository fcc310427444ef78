"""The scores of the pictures that a model drew after texts: against real ones as a set, and each against its text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rac3.clip.encoder import Encoder
from rac3.documents.document import Picture
from rac3.evaluation.bootstrap import mean_of
from rac3.evaluation.distributions import cmmd_metrics, distribution_metrics
from rac3.evaluation.features import Embedded, ImageFeatures

CLIPSCORE_WEIGHT = 2.5  # arXiv 2104.08718, section 3


def clipscore(similarities: Float[np.ndarray, " pictures"]) -> Any:
    """CLIPScore with its interval: the mean of 2.5 max(cos, 0) of pictures and texts; None without any."""
    return mean_of(CLIPSCORE_WEIGHT * np.maximum(similarities, 0).astype(np.float64)) if len(similarities) else None


def set_metrics(
    encoder: Encoder,
    network: ImageFeatures,
    drawn: Sequence[Picture],
    real: Embedded,
    real_vectors: Float[np.ndarray, "images embed"],
) -> dict[str, Any]:
    """The drawn pictures against the real ones: by the network's name, the distances over its features; and CMMD.

    Args:
      real: the network's features of the real pictures.
      real_vectors: of the real pictures by the encoder.
    """
    vectors = encoder.embed_images(drawn) if len(drawn) else np.zeros((0, encoder.width), np.float32)
    found = distribution_metrics(network.name, network.embed(drawn), real)
    return {found.pop("name"): found, "cmmd": cmmd_metrics(vectors, real_vectors)}
