"""Re-ranking: which of several samples is kept (paper, section 4.2)."""

import numpy as np
from jaxtyping import Float, Int


def best_by_clip(
    captions: Float[np.ndarray, "prompts embed"], images: Float[np.ndarray, "prompts samples embed"]
) -> tuple[Int[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]]:
    """The sample whose image is most similar to the caption, and its CLIP score: cosine, of vectors of L2 norm 1."""
    scores = np.einsum("pe,pse->ps", captions, images)
    best = scores.argmax(1)
    return best, np.take_along_axis(scores, best[:, None], 1)[:, 0]


def best_by_perplexity(mean_log_probs: Float[np.ndarray, "prompts samples"]) -> Int[np.ndarray, " prompts"]:
    """The sample with the lowest perplexity."""
    return mean_log_probs.argmax(1)
