"""Caption to image (paper, section 4.2)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rac3.generation.generator import Generator
from rac3.generation.prompts import caption_to_image
from rac3.generation.request import Draw
from rac3.generation.sampling import Sampling
from rac3.tokens.html import Sequenced


def generate_images(
    generator: Generator,
    captions: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
    retrieved: Sequence[Sequence[Sequenced]],
    sampling: Sampling,
    samples: int,
    seed: int,
) -> Int[np.ndarray, "prompts samples tokens"]:
    """VQGAN codes of `samples` images for each caption, given the documents that the caption retrieved.

    Args:
      captions: ids of the text tokenizer.
      retrieved: the documents in context for each caption.

    Raises:
      InputError: an empty caption, or a prompt that leaves no room for the image.
    """
    vocabulary = generator.vocabulary
    prompts = [caption_to_image(vocabulary, documents, ids) for documents, ids in zip(retrieved, captions, strict=True)]
    image = Draw(vocabulary.is_image(np.arange(vocabulary.padded_size)), generator.tokens_per_image)
    ids, _ = generator.samples(prompts, image, sampling, samples, seed)
    return np.array(ids, np.int32).reshape(len(prompts), samples, -1) - vocabulary.image_start
