"""The config of the frozen CLIP, and how it is opened from its artifact."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.encoder import Encoder
from rac3.clip.linear import LinearConfig
from rac3.clip.model import CLIPConfig
from rac3.config import InputError
from rac3.tokens.text import TextTokenizer
from rac3.weights.fitting import ComputeDtype, FitConfig


@dataclass(frozen=True)
class FrozenCLIP:
    """CLIP: a published CLIP or SigLIP if `checkpoint` is given, with its own model, tokenizer and image preprocessing.

    Otherwise one that is fitted here as the other fields say; the text tower has the vocabulary of its tokenizer. A
    `LinearConfig` as `model` needs far less data and time than Transformers do, and the extra `features`.

    Attributes:
      checkpoint: a folder that Hugging Face's `CLIPModel`, `SiglipModel`, `Siglip2Model` or OpenCLIP wrote, or a name
        on the Hugging Face hub (`rac3/clip/families/` has a module per format).
      dtype: of the layers when documents are embedded; the vectors are float32.
      max_logit_scale: bound of the inverse temperature during the fit, 100 in CLIP; with a low one (3), the vectors of
        a small data set separate subjects rather than surroundings.
      text_crop: share of the captions that are truncated to a random length during the fit.
      image_crop: the smallest side of a random square crop during the fit, as a share of the image; 1 for none. Linear
        towers see whole images, whose features are computed once.
      subject_field: the metadata field that names what a document shows, such as `Data.entity_field`. Documents of one
        subject are then positives of each other: text and image, text and text, image and image. "": only the text
        and the image of one document are.
    """

    checkpoint: str | None = None
    dtype: ComputeDtype = "float32"
    model: Annotated[CLIPConfig | LinearConfig, tyro.conf.AvoidSubcommands] = field(default_factory=CLIPConfig)
    tokenizer: TextTokenizer = field(default_factory=TextTokenizer)
    max_logit_scale: float = 100.0
    text_crop: float = 0.0
    image_crop: float = 0.7
    subject_field: str = ""
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.text_crop <= 1 or not 0 < self.image_crop <= 1 or self.max_logit_scale <= 0:
            raise InputError(
                f"clip: text_crop={self.text_crop} must lie in 0 to 1, image_crop={self.image_crop} above 0 up to 1, "
                f"and max_logit_scale={self.max_logit_scale} above 0; 0, 0.7 and 100 are the defaults"
            )

    def open(self, folder: Path) -> Encoder:
        """What `ClipCheckpoint.save` wrote into `folder`."""
        return ClipCheckpoint.open(folder).encoder(self.dtype)
