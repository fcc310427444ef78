"""Image to caption (paper, section 4.2): of several samples, the one with the lowest perplexity."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rac3.generation.generator import Generator
from rac3.generation.prompts import image_to_caption
from rac3.generation.request import Draw
from rac3.generation.rerank import best_by_perplexity
from rac3.generation.sampling import Sampling
from rac3.tokens.html import Sequenced
from rac3.tokens.vocabulary import END_OF_INFILL, NUM_SPECIALS


def generate_captions(
    generator: Generator,
    images: Sequence[Int[np.ndarray, " tokens"]],
    retrieved: Sequence[Sequence[Sequenced]],
    sampling: Sampling,
    samples: int,
    max_tokens: int,
    seed: int,
) -> list[Int[np.ndarray, " _"]]:
    """For each image, the best of `samples` captions, given the documents that the image retrieved.

    Args:
      images: VQGAN codes of each image.
      retrieved: the documents in context for each image.
      max_tokens: of a caption; it also ends where the context does.

    Returns:
      the caption of each image, as ids of the text tokenizer.

    Raises:
      InputError: a prompt that leaves no room for a caption.
    """
    vocabulary = generator.vocabulary
    prompts = [
        image_to_caption(vocabulary, documents, codes) for documents, codes in zip(retrieved, images, strict=True)
    ]
    text = Draw(vocabulary.is_text(np.arange(vocabulary.padded_size)), max_tokens, END_OF_INFILL)
    ids, log_probs = generator.samples(prompts, text, sampling, samples, seed)
    best = best_by_perplexity(log_probs)
    return [row[choice] - NUM_SPECIALS for row, choice in zip(ids, best.tolist(), strict=True)]
