"""The sources of an experiment by their roles, where it goes, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError
from rac3.documents.webdataset import WebDataset
from rac3.evaluation.settings import EvaluationConfig
from rac3.experiment import Data, Experiment
from rac3.retrieval.fixed import Fixed
from rac3.vqgan.discriminator import AdversarialConfig
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGANConfig
from rac3.vqgan.objective import VQGANObjective
from rac3.vqgan.perceptual import PerceptualConfig
from rac3.weights.fitting import FitConfig

DATA = Data(
    train=WebDataset("a"),
    memory={"old": WebDataset("b"), "new": WebDataset("c")},
    withdrawn=("old",),
    validation=WebDataset("d"),
    test=WebDataset("e"),
)
SMALL = Experiment("mine", DATA)


def test_sources_are_in_the_order_in_which_they_are_prepared():
    assert list(DATA.sources().items()) == [
        ("train", WebDataset("a")),
        ("new", WebDataset("c")),
        ("validation", WebDataset("d")),
        ("test", WebDataset("e")),
    ]
    assert list(replace(DATA, withdrawn=(), test=None).sources()) == ["train", "old", "new", "validation"]
    assert DATA.fit_on == ("train",)


def test_roles():
    """A withdrawn part has one too: it was the memory's."""
    roles = {split: DATA.role(split) for split in ("train", "old", "new", "validation", "test")}
    assert roles == {
        "train": "train",
        "old": "memory",
        "new": "memory",
        "validation": "held out",
        "test": "held out",
    }


def test_a_workdir_is_named_by_the_experiment_unless_it_is_given():
    assert SMALL.folder == Path("runs/mine")
    assert replace(SMALL, workdir="/tmp/w").folder == Path("/tmp/w")


WRONG: dict[str, Callable[[], Any]] = {
    "seed=-1": lambda: replace(SMALL, seed=-1),
    "max_text_tokens=0": lambda: replace(SMALL, max_text_tokens=0),
    "max_reject_fraction=-0.1": lambda: replace(SMALL, max_reject_fraction=-0.1),
    "max_reject_fraction=1.1": lambda: replace(SMALL, max_reject_fraction=1.1),
    "query_dropout=-0.1": lambda: replace(SMALL, query_dropout=-0.1),
    "query_dropout=1.0": lambda: replace(SMALL, query_dropout=1.0),
    "num_views=0": lambda: replace(SMALL, num_views=0),
    "num_views=2 are all the same": lambda: replace(SMALL, num_views=2, query_dropout=0.0),
    "documents_per_shard=0": lambda: replace(SMALL, documents_per_shard=0),
    "evaluation.max_caption_tokens=64 exceeds max_text_tokens=63": lambda: replace(SMALL, max_text_tokens=63),
    "batches.candidates=4 exceeds selection.depth=3": lambda: replace(
        SMALL, selection=replace(SMALL.selection, depth=3)
    ),
    "retriever names 9 documents, more than the selection.depth=8": lambda: replace(
        SMALL, retriever=Fixed(tuple("abcdefghi"))
    ),
    "names a part 'train'": lambda: Data(WebDataset("a"), memory={"train": WebDataset("b")}),
    "names a part 'a/b'": lambda: Data(WebDataset("a"), memory={"a/b": WebDataset("b")}),
    "data.withdrawn names 'x'": lambda: replace(DATA, withdrawn=("x",)),
    "data.fit_on names 'validation'": lambda: replace(DATA, fit_on=("train", "validation")),
    "data.fit_on is empty": lambda: replace(DATA, fit_on=()),
    "test and train are the same source": lambda: replace(DATA, test=WebDataset("a")),
    "new and validation are the same source": lambda: replace(DATA, validation=WebDataset("c")),
    "fit: steps=0": lambda: FitConfig(steps=0),
    "batch=0": lambda: FitConfig(batch=0),
    "peak_lr=0.0 must be positive": lambda: FitConfig(peak_lr=0.0),
    "fit: steps=5": lambda: FitConfig(steps=5, max_documents=0),
    "b1=1.0": lambda: FitConfig(b1=1.0),
    "b2=1.0": lambda: FitConfig(b2=1.0),
    "text_crop=1.5": lambda: FrozenCLIP(text_crop=1.5),
    "image_crop=0.0": lambda: FrozenCLIP(image_crop=0.0),
    "max_logit_scale=0.0": lambda: FrozenCLIP(max_logit_scale=0.0),
    "vqgan.resolution=64 is for a checkpoint": lambda: FrozenVQGAN(resolution=64),
    "quantizer='gumbel' can't be fitted": lambda: FrozenVQGAN(model=VQGANConfig(quantizer="gumbel")),
    "adversarial.start=10 is not below vqgan.fit.steps=10": lambda: FrozenVQGAN(
        objective=VQGANObjective(adversarial=AdversarialConfig(weight=0.5, start=10)), fit=FitConfig(steps=10)
    ),
    "adversarial.n_layers=3 needs pictures of": lambda: FrozenVQGAN(
        model=VQGANConfig(resolution=16, ch_mult=(1, 2)),
        objective=VQGANObjective(adversarial=AdversarialConfig(weight=0.5)),
    ),
    "the perceptual loss needs pictures of": lambda: FrozenVQGAN(
        model=VQGANConfig(resolution=8, ch_mult=(1, 2)),
        objective=VQGANObjective(perceptual=PerceptualConfig(("lpips.pth",))),
    ),
    "evaluation.documents=0": lambda: EvaluationConfig(documents=0),
    "evaluation.image_samples=0": lambda: EvaluationConfig(image_samples=0),
    "evaluation.caption_samples=0": lambda: EvaluationConfig(caption_samples=0),
    "evaluation.num_retrieved=-1": lambda: EvaluationConfig(num_retrieved=-1),
}


@pytest.mark.parametrize("says", WRONG)
def test_what_could_not_work_is_refused(says: str):
    with pytest.raises(InputError) as raised:
        WRONG[says]()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_limits_themselves_are_allowed():
    replace(SMALL, max_reject_fraction=0.0)
    replace(SMALL, max_reject_fraction=1.0, query_dropout=0.0, max_text_tokens=64)
    replace(SMALL, selection=replace(SMALL.selection, depth=4))
    replace(SMALL, retriever=Fixed(tuple("abcdefgh")))
    FrozenCLIP(text_crop=1.0, image_crop=1.0)
    FrozenVQGAN(objective=VQGANObjective(adversarial=AdversarialConfig(weight=0.5, start=9)), fit=FitConfig(steps=10))
    FrozenVQGAN("a.ckpt", resolution=64, model=VQGANConfig(quantizer="gumbel"))
    FitConfig(steps=1, batch=1, max_documents=1, b1=0.0, b2=0.0)
