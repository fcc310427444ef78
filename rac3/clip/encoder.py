"""The mixed-modal encoder (paper 3.1): a document's vector is the mean of its text's and its image's CLIP vectors."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rac3.clip.images import OPENAI_MEAN, OPENAI_STD
from rac3.clip.model import CLIPTextConfig, drop_patches, drop_text_tokens
from rac3.clip.siglip import SiglipTextConfig
from rac3.config import InputError
from rac3.devices.batches import DeviceBatches, power_of_two
from rac3.documents.document import Picture, pixels_of, prepare_image
from rac3.tokens.text import Tokenizer


@runtime_checkable
class Encoder(Protocol):
    """What the stages need of an encoder: texts and images to vectors of L2 norm 1 and one width.

    `drop_keys`, one per item, are those of `query_dropout_keys` and ask for query dropout (paper 3.2) at `drop_rate`.
    An encoder without dropout may ignore them. `MixedEncoder` is one; an object of a user's config needs only this.
    """

    @property
    def width(self) -> int: ...

    def embed_texts(
        self, texts: Sequence[str], *, drop_keys: Key[Array, " batch"] | None = None, drop_rate: float = 0.2
    ) -> Float[np.ndarray, "batch embed"]: ...

    def embed_images(
        self,
        images: Sequence[Picture],
        *,
        drop_keys: Key[Array, " batch"] | None = None,
        drop_rate: float = 0.2,
    ) -> Float[np.ndarray, "batch embed"]: ...


@runtime_checkable
class Towers(Protocol):
    """A text and an image tower that `MixedEncoder` runs, as one Flax module: `CLIP`, `SigLIP`."""

    @property
    def width(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def num_patches(self) -> int: ...

    def encode_text(
        self, ids: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch embed"]: ...

    def encode_image(
        self,
        pixels: Float[Array, "batch height width channel"],
        patch_keep: Bool[Array, "batch patches"] | None = None,
    ) -> Float[Array, "batch embed"]: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class TextIds(Protocol):
    """Texts to the ids that a text tower reads, and a mask that is False at padding."""

    @property
    def max_length(self) -> int: ...
    @property
    def has_bos(self) -> bool: ...

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]: ...


@dataclass(frozen=True)
class ClipText:
    """Texts to the ids of CLIP's text tower: `<bos> tokens <eos>`, truncated to the tower's positions.

    Raises:
      InputError: the tower has no room for the ids, or looks for another end-of-text id than `eos`.
    """

    tokenizer: Tokenizer
    config: CLIPTextConfig
    bos: int
    eos: int

    def __post_init__(self) -> None:
        largest = max(self.bos, self.eos, self.tokenizer.size - 1)
        if largest >= self.config.vocab_size:
            raise InputError(
                f"clip text: vocab_size={self.config.vocab_size} has no room for id {largest}; use {largest + 1}"
            )
        # 2 marks an old checkpoint, whose tower takes the highest id of a row for the end of the text
        end = largest if self.config.eos_token_id == 2 else self.config.eos_token_id
        if self.eos != end:
            raise InputError(f"clip text: eos={self.eos} is not {end}, where the tower looks for the end; use {end}")

    @classmethod
    def fitted(cls, tokenizer: Tokenizer, config: CLIPTextConfig) -> "ClipText":
        """For a tower that is fitted here: `<bos>` and `<eos>` are the two ids after the tokenizer's own."""
        return cls(tokenizer, config, bos=tokenizer.size, eos=tokenizer.size + 1)

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def has_bos(self) -> bool:
        return True

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]:
        """The ids, padded with 0, and where they are not padding; `seq` is the longest row's length.

        "a cat", "cat" -> <bos> a   cat   <eos>
                          <bos> cat <eos> .
        """
        room = self.config.max_position_embeddings - 2
        rows = [[self.bos, *self.tokenizer.encode(text)[:room], self.eos] for text in texts]
        ids = np.zeros((len(rows), max(map(len, rows), default=2)), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask


@dataclass(frozen=True)
class SiglipText:
    """Texts to the ids of SigLIP's text tower: `tokens <eos> <pad> ...`, as long as the tower's positions.

    The tokenizer decides about case, punctuation and special tokens. Padding is part of the input: the tower attends to
    it.

    Raises:
      InputError: the tower has no room for the tokenizer's ids, or pads with another id.
    """

    tokenizer: Tokenizer
    config: SiglipTextConfig

    def __post_init__(self) -> None:
        if self.tokenizer.size > self.config.vocab_size:
            raise InputError(
                f"siglip text: vocab_size={self.config.vocab_size} has no room for id {self.tokenizer.size - 1}; give "
                "the tokenizer of the checkpoint"
            )
        if self.tokenizer.pad != self.config.pad_token_id:
            raise InputError(
                f"siglip text: pad_token_id={self.config.pad_token_id} is not {self.tokenizer.pad}, with which the "
                f"tokenizer pads; use {self.tokenizer.pad}"
            )

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def has_bos(self) -> bool:
        return False

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]:
        """The ids, and where they are not padding.

        "A cat!", "" -> a     cat   <eos> <pad>
                        <eos> <pad> <pad> <pad>
        """
        ids = np.full((len(texts), self.max_length), self.config.pad_token_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, text in enumerate(texts):
            tokens = self.tokenizer.encode_with_specials(text, self.max_length)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask


def query_dropout_keys(seed: int, documents: Sequence[str], view: int = 0) -> Key[Array, " batch"]:
    """One key per document, a function of (seed, document key, view) alone: batching changes nothing."""
    digests = [hashlib.blake2b(key.encode(), digest_size=4).digest() for key in documents]
    hashes = np.array([int.from_bytes(digest, "little") for digest in digests], np.uint32)
    key = jax.random.key(seed)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, view) if view else key, hashes)


class MixedEncoder:
    """Frozen towers (CLIP, SigLIP) over batches, on all of this process's devices.

    Batches have few shapes (`DeviceBatches`), and texts are padded to a power of two, in tokens. Each shape compiles
    once.
    """

    def __init__(
        self,
        towers: Towers,
        params: dict[str, Any],
        text: TextIds,
        *,
        batch_size: int = 256,
        image_mean: tuple[float, ...] = OPENAI_MEAN,
        image_std: tuple[float, ...] = OPENAI_STD,
        square: Callable[[np.ndarray, int], np.ndarray] = prepare_image,
    ) -> None:
        """Images are brought to the towers' image size by `square`, then normalized by mean and deviation (of 0..1).

        Raises:
          InputError: `batch_size` is below 1.
        """
        self.towers, self.text, self._square = towers, text, square
        self._batches = DeviceBatches(batch_size)
        self._params = jax.device_put(params, self._batches.replicated)
        mean, std = np.array(image_mean, np.float32) * 255, np.array(image_std, np.float32) * 255

        def embed_ids(params: Any, ids: Array, mask: Array, keys: Array | None, rate: float) -> Array:
            if keys is not None:
                ids, mask = drop_text_tokens(keys, ids, mask, rate, text.has_bos)
            return cast(Array, towers.apply({"params": params}, ids, mask, method="encode_text"))

        def embed_pixels(params: Any, pixels: Array, keys: Array | None, rate: float) -> Array:
            keep = None if keys is None else drop_patches(keys, towers.num_patches, rate)
            return cast(Array, towers.apply({"params": params}, (pixels - mean) / std, keep, method="encode_image"))

        self._embed_ids = jax.jit(embed_ids, static_argnames="rate")
        self._embed_pixels = jax.jit(embed_pixels, static_argnames="rate")

    @property
    def width(self) -> int:
        return self.towers.width

    def embed_texts(
        self, texts: Sequence[str], *, drop_keys: Key[Array, " batch"] | None = None, drop_rate: float = 0.2
    ) -> Float[np.ndarray, "batch embed"]:
        """Vectors of L2 norm 1.

        Args:
          drop_keys: one per text (`query_dropout_keys`): query dropout (paper 3.2) at `drop_rate`. None: no dropout.
        """

        def prepare(rows: np.ndarray) -> PyTree:
            ids, mask = self.text([texts[row] for row in rows])
            width = min(power_of_two(ids.shape[1]), self.text.max_length)
            padding = ((0, 0), (0, width - ids.shape[1]))
            return np.pad(ids, padding), np.pad(mask, padding), None if drop_keys is None else drop_keys[rows]

        # sorted by length: a batch is as wide as its longest text
        order = np.argsort([len(text) for text in texts], kind="stable")
        return self._embed(order, drop_keys, drop_rate, prepare, self._embed_ids)

    def embed_images(
        self,
        images: Sequence[Picture],
        *,
        drop_keys: Key[Array, " batch"] | None = None,
        drop_rate: float = 0.2,
    ) -> Float[np.ndarray, "batch embed"]:
        """Vectors of L2 norm 1 for images of any size, brought to the towers' by `square`; threads decode encoded ones.

        Args:
          drop_keys: one per image: query dropout of patches at `drop_rate`. None: no dropout.
        """
        size = self.towers.image_size

        def prepare(rows: np.ndarray) -> PyTree:
            squares = self._batches.each(lambda row: self._square(pixels_of(images[row]), size), rows)
            # uint8 until it is on the device: a quarter of the bytes to move
            return np.stack(squares), None if drop_keys is None else drop_keys[rows]

        return self._embed(np.arange(len(images)), drop_keys, drop_rate, prepare, self._embed_pixels)

    def _embed(
        self,
        order: Int[np.ndarray, " batch"],
        keys: Array | None,
        rate: float,
        prepare: Callable[[np.ndarray], PyTree],
        apply: Callable[..., Array],
    ) -> Float[np.ndarray, "batch embed"]:
        if keys is not None and not 0 <= rate < 1:
            raise InputError(f"query dropout rate={rate} is outside [0, 1); the paper uses 0.2")
        if keys is not None and len(keys) != len(order):
            raise ValueError(f"{len(keys)} dropout keys for {len(order)} items; give one each")
        vectors = np.zeros((len(order), self.width), np.float32)
        done = 0
        for batch in self._batches.run(order, prepare, lambda arrays: apply(self._params, *arrays, rate)):
            vectors[order[done : done + len(batch)]] = batch
            done += len(batch)
        return vectors


def mix(
    text: Float[np.ndarray, "batch embed"],
    image: Float[np.ndarray, "batch embed"],
    has_text: Bool[np.ndarray, " batch"],
    has_image: Bool[np.ndarray, " batch"],
) -> Float[np.ndarray, "batch embed"]:
    """Document vectors (paper 3.1, eq. 1): the mean of its text's and its image's, scaled to L2 norm 1.

    A document with only one of them has that vector; one without either has zeros, which match nothing.
    """
    total = np.where(has_text[:, None], text, 0) + np.where(has_image[:, None], image, 0)
    norm = np.linalg.norm(total, axis=1, keepdims=True)
    return (total / np.maximum(norm, 1e-12)).astype(np.float32)
