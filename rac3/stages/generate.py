"""Generate: your prompt -> what it retrieves, and images or a caption."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from rac3.config import InputError
from rac3.documents.document import ImageError, decode_image
from rac3.generation.sampling import Sampling
from rac3.retrieval.retriever import Chosen
from rac3.run import Found, Run


@dataclass(frozen=True)
class GenerateOptions:
    """What `rac3 generate` makes.

    Attributes:
      prompt: a caption to draw.
      image: a picture to caption instead.
      num_retrieved: documents in context; None is 2, or all that retriever:fixed names.
      samples: images to draw; captions to choose from.
      seed: of the drawing; another one draws other images.
      temperature: of sampling, 0 for the most probable ids; None is what the config evaluates with.
      top_p: ids are drawn from the smallest set of this probability; None is what the config evaluates with.
      out: the folder for the images; "" is WORKDIR/generated.
    """

    prompt: str = ""
    image: str = ""
    num_retrieved: int | None = None
    samples: int = 4
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    out: str = ""

    def __post_init__(self) -> None:
        if (self.num_retrieved is not None and self.num_retrieved < 0) or self.samples < 1:
            raise InputError(
                f"num_retrieved={self.num_retrieved} must be at least 0 and samples={self.samples} at least 1"
            )
        self.sampling(Sampling())

    def sampling(self, configured: Sampling) -> Sampling:
        """The configured sampling with the options' own settings."""
        own = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        return replace(configured, **{name: value for name, value in own.items() if value is not None})


def generate(run: Run, options: GenerateOptions) -> str:
    """Runs one prompt; the report of what was retrieved and made, for the terminal.

    Raises:
      InputError: no prompt, or an image that cannot be read.
    """
    if (options.prompt.strip() == "") == (options.image == ""):
        raise InputError("the prompt has no text and no image, or both; give --prompt TEXT or --image FILE")
    settings, retriever, k = run.experiment.evaluation, run.experiment.retriever, options.num_retrieved
    if k is None:
        k = retriever.num_neighbors if isinstance(retriever, Chosen) else 2
    if options.image:
        pixels, sampling = _read_image(Path(options.image)), options.sampling(settings.caption_sampling)
        captioned = run.caption(pixels, k, options.samples, options.seed, sampling)
        return "\n".join([*_retrieved(captioned.retrieved, captioned.dropped), f"caption: {captioned.text}"])
    folder = Path(options.out) if options.out else run.workdir.path / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = run.draw(options.prompt, k, options.samples, options.seed, options.sampling(settings.image_sampling))
    lines = _retrieved(drawn.retrieved, drawn.dropped)
    name = "".join(c if c.isalnum() else "-" for c in options.prompt.strip().lower())[:60]
    for rank, image in enumerate(drawn.images):
        path = folder / f"{name}-{rank}.png"
        PIL.Image.fromarray(image).save(path)
        lines.append(f"image {rank}: {path}")
    return "\n".join(lines)


def _retrieved(kept: list[Found], dropped: list[Found]) -> list[str]:
    lines = [f"retrieved {item.document.key} ({item.score:.2f}): {item.document.text}" for item in kept]
    return lines + [f"does not fit into the context: {item.document.key} ({item.score:.2f})" for item in dropped]


def _read_image(path: Path) -> UInt8[np.ndarray, "_ _ 3"]:
    if not path.is_file():
        raise InputError(f"image {path} does not exist; give a png, jpeg or webp file")
    try:
        return decode_image(path.read_bytes())
    except ImageError as error:
        raise InputError(f"image {path} cannot be read: {error}") from error
