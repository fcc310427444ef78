"""Generate: a prompt of one's own -> what it retrieves, and images or a caption."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.clip.encoder import Encoder
from rac3.config import InputError
from rac3.documents.document import Document, ImageError, decode_image
from rac3.documents.store import TokenizedDocument
from rac3.experiment import Experiment
from rac3.generation.captions import generate_captions
from rac3.generation.generator import Generator
from rac3.generation.images import generate_images
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.retriever import Queries
from rac3.stages.encoders import open_clip, open_text, open_vqgan
from rac3.stages.ingest import vocabulary_of
from rac3.stages.memory import OpenMemory
from rac3.stages.train import build_model, open_params
from rac3.tokens.html import Sequenced
from rac3.tokens.text import Tokenizer
from rac3.vqgan.codec import ImageTokenizer


@dataclass(frozen=True)
class Found:
    """A retrieved document and its similarity to the query."""

    document: Document
    score: float
    tokens: TokenizedDocument


@dataclass(frozen=True)
class Session:
    """A trained model, its encoders and its memory, open for prompts."""

    experiment: Experiment
    generator: Generator
    builder: GroupBuilder
    tokenizer: Tokenizer
    codec: ImageTokenizer
    encoder: Encoder
    memory: OpenMemory | None

    @classmethod
    def open(cls, experiment: Experiment, workdir: Workdir, trained: Experiment | None = None) -> "Session":
        """The model of `trained` (default: the experiment's own) with the retriever of `experiment`.

        Raises:
          InputError: something is not made yet; the message has the command that makes it.
        """
        tokenizer, codec = open_text(experiment, workdir), open_vqgan(experiment, workdir)
        vocabulary = vocabulary_of(tokenizer, codec)
        model = build_model(experiment, vocabulary, codec.tokens_per_image)
        params = open_params(trained or experiment, workdir, model)
        memory = None
        if recipes.retrieves(experiment):
            memory = OpenMemory(experiment, workdir, recipes.memory_splits(experiment, "test"))
        return cls(
            experiment,
            Generator(model, params, vocabulary, codec.tokens_per_image),
            GroupBuilder(vocabulary, Masking("none"), 1.0, experiment.batches.retrieved),
            tokenizer,
            codec,
            open_clip(experiment, workdir),
            memory,
        )

    def retrieve(self, text: str = "", image: UInt8[np.ndarray, "_ _ 3"] | None = None, k: int = 2) -> list[Found]:
        """The documents that a text, or an image, retrieves; best first, at most k that have something to show.

        Raises:
          InputError: neither a text nor an image, or both: a query is one part of a document (paper, section 3.4).
        """
        text = text.strip()  # as the texts of documents are
        if (text == "") == (image is None):
            raise InputError("the prompt has no text and no image, or both; give --prompt TEXT or --image FILE")
        if self.memory is None or k == 0:
            return []
        vector: Float[np.ndarray, "1 embed"] = (
            self.encoder.embed_texts([text]) if image is None else self.encoder.embed_images([image])
        )
        selected = self.memory.retrieve(Queries([text or "image"], vector, [text]), np.array([-1]))
        ranked = zip(selected.ids[0].tolist(), selected.scores[0].tolist(), strict=True)
        documents = ((self.memory.document(number), score) for number, score in ranked if number >= 0)
        found = (Found(item.document, score, item) for item, score in documents if self.builder.shown(item) is not None)
        return list(islice(found, k))

    def image(self, text: str, k: int = 2, samples: int = 4, seed: int = 0) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Images of a caption, the one that CLIP likes best first."""
        text = text.strip()
        ids = self.tokenizer.encode(text)
        context = self._sequences(self.retrieve(text, k=k) if ids else [])
        sampling = self.experiment.evaluation.image_sampling
        codes = generate_images(self.generator, [ids], [context], sampling, samples, seed)[0]
        pixels = self.codec.decode(codes)
        scores = self.encoder.embed_images(list(pixels)) @ self.encoder.embed_texts([text])[0]
        return [pixels[i] for i in np.argsort(-scores)]

    def caption(self, pixels: UInt8[np.ndarray, "_ _ 3"], k: int = 2, samples: int = 4, seed: int = 0) -> str:
        """The caption of lowest perplexity of an image."""
        context = self._sequences(self.retrieve(image=pixels, k=k))
        settings = self.experiment.evaluation
        ids = generate_captions(
            self.generator,
            [self.codec.encode([pixels])[0]],
            [context],
            settings.caption_sampling,
            samples,
            settings.max_caption_tokens,
            seed,
        )
        return self.tokenizer.decode(ids[0].tolist())

    def _sequences(self, found: list[Found]) -> list[Sequenced]:
        return self.builder.retrieved_sequences([item.tokens for item in found])


@dataclass(frozen=True)
class GenerateConfig:
    """What `rac3 generate` makes.

    Attributes:
      prompt: a caption to draw.
      image: a picture to caption instead.
      num_retrieved: documents in context; None is 2, or all that retriever:fixed names.
      samples: images to draw; captions to choose from.
      out: the folder for the images; "" is WORKDIR/generated.
    """

    prompt: str = ""
    image: str = ""
    num_retrieved: int | None = None
    samples: int = 4
    out: str = ""

    def __post_init__(self) -> None:
        if (self.num_retrieved is not None and self.num_retrieved < 0) or self.samples < 1:
            raise InputError(
                f"num_retrieved={self.num_retrieved} must be at least 0 and samples={self.samples} at least 1"
            )


def generate(experiment: Experiment, trained: Experiment, workdir: Workdir, config: GenerateConfig) -> str:
    """Runs one prompt; the report of what was retrieved and made, for the terminal.

    Raises:
      InputError: no prompt, or an image that cannot be read.
    """
    if (config.prompt.strip() == "") == (config.image == ""):
        raise InputError("the prompt has no text and no image, or both; give --prompt TEXT or --image FILE")
    pixels = _read_image(Path(config.image)) if config.image else None
    session = Session.open(experiment, workdir, trained)
    retriever, k = experiment.retriever, config.num_retrieved
    if k is None:
        k = len(retriever.keys) if isinstance(retriever, Fixed) else 2
    found = session.retrieve(config.prompt, pixels, k)
    lines = [f"retrieved {item.document.key} ({item.score:.2f}): {item.document.text}" for item in found]
    if pixels is not None:
        caption = session.caption(pixels, k, config.samples, experiment.seed)
        return "\n".join([*lines, f"caption: {caption}"])
    folder = Path(config.out) if config.out else workdir.path / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    images = session.image(config.prompt, k, config.samples, experiment.seed)
    name = "".join(c if c.isalnum() else "-" for c in config.prompt.strip().lower())[:60]
    for rank, image in enumerate(images):
        path = folder / f"{name}-{rank}.png"
        PIL.Image.fromarray(image).save(path)
        lines.append(f"image {rank}: {path}")
    return "\n".join(lines)


def _read_image(path: Path) -> UInt8[np.ndarray, "_ _ 3"]:
    if not path.is_file():
        raise InputError(f"image {path} does not exist; give a png, jpeg or webp file")
    try:
        return decode_image(path.read_bytes())
    except ImageError as error:
        raise InputError(f"image {path} cannot be read: {error}") from error
