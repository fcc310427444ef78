"""An encoder and an image tokenizer of a user's own config, each by one line of it."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny_config

import rac3 as package
from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.clip.encoder import Encoder
from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError, load_config_module
from rac3.documents.document import prepare_image
from rac3.experiment import check_own_part
from rac3.experiment_file import describe
from rac3.run import Run
from rac3.vqgan.codec import ImageTokenizer
from rac3.vqgan.frozen import FrozenVQGAN

Command = Callable[..., int]
TINY = tiny_config.get_config()

# The mean color of each quarter for images, and of words that name colors for texts.
OWN_ENCODER = '''
from dataclasses import dataclass, replace

import numpy as np
import tiny_config
from rac3.documents.document import pixels_of, prepare_image


@dataclass(frozen=True)
class Colors:
    """Mean colors."""

    width: int = 12
    sharpness: float = 1.0

    def embed_texts(self, texts, *, drop_keys=None, drop_rate=0.2):
        return self._unit([np.frombuffer(text.encode().ljust(self.width)[: self.width], np.uint8) for text in texts])

    def embed_images(self, images, *, drop_keys=None, drop_rate=0.2):
        small = [prepare_image(pixels_of(image), 2).ravel() for image in images]
        return self._unit([each[: self.width] for each in small])

    def _unit(self, rows):
        vectors = np.array(rows, np.float32).reshape(-1, self.width) ** self.sharpness
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def get_config():
    return replace(tiny_config.get_config(), name="own", clip=Colors())
'''

# 5 x 5 patches, each one of 8 colors: a bit of red, of green and of blue.
OWN_TOKENIZER = '''
from dataclasses import dataclass, replace

import numpy as np
import tiny_config
from rac3.documents.document import pixels_of, prepare_image


@dataclass(frozen=True)
class Mosaic:
    """A few large patches of few colors."""

    grid: int = 5
    patch: int = 8

    @property
    def resolution(self):
        return self.grid * self.patch

    @property
    def tokens_per_image(self):
        return self.grid**2

    @property
    def codebook_size(self):
        return 8

    def encode(self, images):
        small = np.array([prepare_image(pixels_of(image), self.grid) for image in images], np.int32)
        small = small.reshape(-1, self.grid**2, 3)
        return (small // 128 @ np.array([4, 2, 1])).astype(np.int32)

    def decode(self, codes):
        colors = np.stack([codes // 4, codes // 2 % 2, codes % 2], axis=-1).astype(np.uint8) * 255
        colors = colors.reshape(-1, self.grid, self.grid, 3)
        return colors.repeat(self.patch, axis=1).repeat(self.patch, axis=2)


def get_config():
    tiny = tiny_config.get_config()
    evaluation = replace(tiny.evaluation, documents=2, control=False)
    return replace(tiny, name="own", vqgan=Mosaic(), compare_with_cm3=False, evaluation=evaluation)
'''


# Of all ids, only image code 3 may be drawn.
OWN_PROCESSOR = '''
from dataclasses import dataclass, replace

import jax.numpy as jnp
import tiny_config
from rac3.generation.sampling import Sampling


@dataclass(frozen=True)
class Only:
    """Forbids all ids but that of one image code."""

    code: int

    def __call__(self, log_probs, step):
        kept = jnp.arange(log_probs.shape[-1]) == step.vocabulary.image_start + self.code
        return jnp.where(kept, log_probs, -jnp.inf)


def get_config():
    tiny = tiny_config.get_config()
    return replace(tiny, evaluation=replace(tiny.evaluation, image_sampling=Sampling(processors=(Only(3),))))
'''


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(body: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(body)
        return path

    return write


@pytest.mark.slow
def test_an_encoder_of_the_config_embeds_documents_and_queries(
    config: Callable[[str], Path], rac3: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = config(OWN_ENCODER)
    assert rac3("prepare", str(path), "--workdir", str(tmp_path / "w"), "--vqgan.fit.steps", "2") == 0
    assert not (tmp_path / "w" / "clip").exists()  # there is nothing to fit or to keep
    run = package.load(tmp_path / "w", config=path)
    document = run.documents("test")[0].document
    text, colors = document.text.encode()[:12], prepare_image(document.images[0].pixels(), 2).ravel()
    for part, plain in (("text", np.frombuffer(text, np.uint8)), ("image", colors)):
        vector = plain / np.linalg.norm(plain.astype(np.float64))
        np.testing.assert_allclose(run.queries("test", part)[:1][0], vector, atol=1e-6)
    best = run.retrieve(document.text, k=1)[0]
    memory = np.concatenate([np.asarray(run.embeddings(split)[:]) for split in ("train", "memory")])
    assert best.score == pytest.approx((memory @ run.queries("test", "text")[:1][0]).max(), abs=1e-5)
    assert rac3("audit", str(path), "--workdir", str(tmp_path / "w"), "--vqgan.fit.steps", "2") == 0
    capsys.readouterr()
    assert rac3("plan", str(path), "--workdir", str(tmp_path / "w")) == 0
    assert re.search(r"embed +- +- +not known of this encoder", capsys.readouterr().out)


@pytest.mark.slow
def test_an_image_tokenizer_of_the_config_goes_through_the_whole_chain(
    config: Callable[[str], Path], rac3: Command, tmp_path: Path
):
    path = config(OWN_TOKENIZER)
    where = ("--workdir", str(tmp_path / "w"))
    assert rac3("run", str(path), *where) == 0
    assert not (tmp_path / "w" / "vqgan").exists()
    run = package.load(tmp_path / "w", config=path)
    item = run.documents("test")[0]
    bits = prepare_image(item.document.images[0].pixels(), 5).reshape(25, 3) >= 128
    np.testing.assert_array_equal(item.ids[1], bits @ [4, 2, 1])
    assert run.vocabulary.padded_size > run.tokenizer.size + 8
    assert rac3("generate", str(path), *where, "--prompt", "a fox", "--samples", "2") == 0
    drawn = np.asarray(PIL.Image.open(tmp_path / "w" / "generated" / "a-fox-0.png"))
    assert drawn.shape == (40, 40, 3)
    np.testing.assert_array_equal(drawn, drawn[::8, ::8].repeat(8, axis=0).repeat(8, axis=1))
    assert "Mosaic of the config" in _encoders_page(rac3, path, where)


@pytest.mark.slow
def test_a_processor_of_the_config_decides_what_is_drawn(config: Callable[[str], Path], rac3: Command, workdir: Path):
    """From the command and from Python, of a model that was trained without it."""
    path = config(OWN_PROCESSOR)
    experiment = load_config_module(str(path)).get_config()
    describe(Run(experiment, Workdir(workdir, experiment.name, str(path))))
    model = package.load(workdir, config=path)
    wanted = model.images.decode(np.full((1, model.images.tokens_per_image), 3, np.int32))[0].astype(int)
    answer = model.generate("a fox", samples=1)
    assert rac3("generate", str(path), "--workdir", str(workdir), "--prompt", "a fox", "--samples", "1") == 0
    drawn = PIL.Image.open(workdir / "generated" / "a-fox-0.png")
    for picture in (answer.images[0], drawn):
        assert np.abs(np.asarray(picture).astype(int) - wanted).max() <= 1


def _encoders_page(rac3: Command, path: Path, where: tuple[str, str]) -> str:
    assert rac3("encoders", str(path), *where, "--report", "--report-images", "4") == 0
    return (Path(where[1]) / "report" / "encoders.html").read_text()


def test_its_fields_decide_what_is_current_and_are_flags(config: Callable[[str], Path]):
    from rac3.cli import parse

    experiment = load_config_module(str(config(OWN_ENCODER))).get_config()
    sharper, _ = parse("prepare", experiment, ["--clip.sharpness", "2"])
    assert sharper.clip.sharpness == 2
    assert recipes.documents(sharper, "train").fingerprint == recipes.documents(experiment, "train").fingerprint
    assert recipes.queries(sharper, "test").fingerprint != recipes.queries(experiment, "test").fingerprint
    assert recipes.queries(experiment, "test").fingerprint != recipes.queries(TINY, "test").fingerprint


@pytest.mark.parametrize("part", ["clip", "vqgan"])
def test_an_object_that_lacks_a_member_or_is_no_dataclass_is_refused(part: str):
    class Empty:
        pass

    class Whole:
        width = resolution = tokens_per_image = codebook_size = 1
        embed_texts = embed_images = encode = decode = len

    lacks = {"clip": "width and embed_texts and embed_images", "vqgan": "resolution and tokens_per_image"}[part]
    kinds = {"clip": (FrozenCLIP, Encoder), "vqgan": (FrozenVQGAN, ImageTokenizer)}[part]
    with pytest.raises(InputError, match=f"{part}=Empty lacks {lacks}"):
        check_own_part(part, Empty(), *kinds)
    with pytest.raises(InputError, match=f"{part}=Whole is not a dataclass"):
        check_own_part(part, Whole(), *kinds)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (OWN_TOKENIZER.replace("return self.grid**2", "raise SystemExit('loaded')"), "ends well"),
        (
            OWN_TOKENIZER.replace("def decode", "def draw"),
            "vqgan=Mosaic lacks decode; give a FrozenVQGAN, or an object",
        ),
        (
            OWN_ENCODER.replace("@dataclass(frozen=True)", "").replace("width: int", "width"),
            "clip=Colors is not a data",
        ),
    ],
)
def test_reading_a_config_asks_nothing_of_its_objects(body: str, says: str, config: Callable[[str], Path]):
    """A property may load a model; that is for the stages that run it. Without the checks of types under test."""
    code = "import sys; from rac3.config import load_config_module; load_config_module(sys.argv[1]).get_config()"
    command = [sys.executable, "-c", f"{code}; print('ends well')", str(config(body))]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert says in out.stdout + out.stderr
