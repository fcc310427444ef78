"""The image tokenizer: the protocol that the stages use, and the frozen VQGAN that implements it."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int, PyTree, UInt8

from rac3.config import InputError
from rac3.devices.batches import DeviceBatches
from rac3.documents.document import Picture, pixels_of, prepare_image
from rac3.vqgan.model import VQGAN, preprocess, to_pixels

PIXELS_AT_ONCE = 2**20  # per device: 16 images of 256 x 256, whose features take 0.5 GB in float32 at 128 channels


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images to codes and back. An object of a user's config needs no more than this."""

    @property
    def resolution(self) -> int:
        """Height and width of a decoded image, in pixels."""
        ...

    @property
    def tokens_per_image(self) -> int:
        """The number of codes of every image, in raster order."""
        ...

    @property
    def codebook_size(self) -> int:
        """The number of codes; each code is below it."""
        ...

    def encode(self, images: Sequence[Picture]) -> Int[np.ndarray, "images tokens"]:
        """The codes of images of any size, encoded as files (`Image`) or decoded (uint8, height x width x 3)."""
        ...

    def decode(self, codes: Int[np.ndarray, "images tokens"]) -> UInt8[np.ndarray, "images height width 3"]:
        """The images of codes."""
        ...


class VQGANCodec:
    """A frozen VQGAN: pixels to codes and back, on all of this process's devices."""

    def __init__(self, model: VQGAN, params: PyTree) -> None:
        apply: Any = model.apply  # flax types its result by which collections are mutable
        self.config = model.config
        pixels = model.config.resolution**2
        self._batches = DeviceBatches(jax.local_device_count() * max(1, PIXELS_AT_ONCE // pixels))
        self._params = jax.device_put(params, self._batches.replicated)
        self._encode = jax.jit(lambda params, pixels: apply({"params": params}, preprocess(pixels), method="encode"))
        self._decode = jax.jit(lambda params, codes: to_pixels(apply({"params": params}, codes, method="decode")))

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def tokens_per_image(self) -> int:
        return self.config.tokens_per_image

    @property
    def codebook_size(self) -> int:
        return self.config.n_embed

    def encode(self, images: Sequence[Picture]) -> Int[np.ndarray, "images tokens"]:
        """Codes of images of any size: shorter side scaled, middle square kept. Threads decode those that are encoded.

        Raises:
          ImageError: an image can't be decoded.
        """

        def prepare(rows: np.ndarray) -> np.ndarray:
            return np.stack(
                self._batches.each(lambda row: prepare_image(pixels_of(images[row]), self.resolution), rows)
            )

        parts = self._batches.run(np.arange(len(images)), prepare, lambda pixels: self._encode(self._params, pixels))
        return np.concatenate([np.zeros((0, self.tokens_per_image), np.int32), *parts])

    def decode(self, codes: Int[np.ndarray, "images tokens"]) -> UInt8[np.ndarray, "images height width 3"]:
        """The images of codes.

        Raises:
          InputError: the VQGAN was loaded from a checkpoint without a decoder.
        """
        if "decoder" not in self._params:
            raise InputError(
                "this VQGAN has no decoder, so that its codes can't become images; set vqgan.checkpoint to one that has"
            )
        parts = self._batches.run(
            np.arange(len(codes)), lambda rows: codes[rows], lambda codes: self._decode(self._params, codes)
        )
        return np.concatenate([np.zeros((0, self.resolution, self.resolution, 3), np.uint8), *parts])
