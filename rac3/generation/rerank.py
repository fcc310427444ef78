"""Of several samples, which to keep (paper, section 4.2)."""

import numpy as np
from jaxtyping import Float, Int


def best_by_clip(
    captions: Float[np.ndarray, "prompts embed"], images: Float[np.ndarray, "prompts samples embed"]
) -> tuple[Int[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]]:
    """The sample whose image is most like the caption, and its CLIP score (cosine; all vectors have norm 1)."""
    scores = np.einsum("pe,pse->ps", captions, images)
    best = scores.argmax(1)
    return best, np.take_along_axis(scores, best[:, None], 1)[:, 0]


def best_by_perplexity(mean_log_probs: Float[np.ndarray, "prompts samples"]) -> Int[np.ndarray, " prompts"]:
    """The sample with the lowest perplexity."""
    return mean_log_probs.argmax(1)
