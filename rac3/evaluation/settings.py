"""The settings of an evaluation."""

from dataclasses import dataclass, field

from rac3.config import InputError
from rac3.generation.sampling import Sampling


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on the validation and test splits; the tuning split chooses the step of CM3.

    Attributes:
      num_retrieved: documents in context for a model that retrieves; perplexity is measured with 0 to this many.
      documents: the largest number of documents of each split.
      image_samples: images per caption, of which the one with the best CLIP score is kept (paper, section 4.2: 10).
      caption_samples: captions per image, of which the one with the lowest perplexity is kept (paper: 32).
      image_sampling, caption_sampling: how ids are drawn.
      max_caption_tokens: tokens of the longest caption.
      features: the weights of a network over whose features drawn pictures are compared with real ones: the path of
        `pt_inception-2015-12-05-6726825d.pth` (FID) or of `efficientnet-lite0-57934424.pth`, or `efficientnet-lite0`
        for that of the installed package (extra `features`); "" compares none.
      control: also evaluate the model with the `random` retriever instead of its own.
    """

    num_retrieved: int = 2
    documents: int = 1000
    image_samples: int = 10
    caption_samples: int = 32
    image_sampling: Sampling = field(default_factory=Sampling)
    caption_sampling: Sampling = field(default_factory=Sampling)
    max_caption_tokens: int = 64
    features: str = ""
    control: bool = True

    def __post_init__(self) -> None:
        for name in ("documents", "image_samples", "caption_samples", "max_caption_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluation.{name}={getattr(self, name)} is below 1; use at least 1")
        if self.caption_sampling.without == "text":
            raise InputError(
                "evaluation.caption_sampling compares with a prompt without its text, but a caption is asked for by an "
                "image; set its guidance.without (or contrast.without) to documents"
            )
        if self.num_retrieved < 0:
            raise InputError(f"evaluation.num_retrieved={self.num_retrieved} is below 0; use 0 to 2")
