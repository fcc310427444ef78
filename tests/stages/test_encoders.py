"""What the frozen models are fitted on, and that what is saved of them is what is opened."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import tiny_config

from rac3.artifacts.workdir import MANIFEST, Workdir
from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.model import CLIP
from rac3.config import InputError
from rac3.devices.mesh import DeviceMesh, MeshConfig
from rac3.documents.document import Document, Image, Picture, pixels_of, prepare_image
from rac3.documents.world import World
from rac3.run import Run
from rac3.stages import encoders
from rac3.stages.encoders import fit_encoders
from rac3.stages.fit.clip import IMAGES, clip_config
from rac3.tokens.text import TextTokenizer
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.codec import VQGANCodec
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGAN
from rac3.weights.fitting import FitConfig

TINY = tiny_config.get_config()
TEXTS = ["a red fox", "the old lighthouse", "two blue squares on grass"]


def drawn(shapes: dict, seed: int = 0) -> dict:
    """Parameters of the usual sizes; to compile `init` would take longer than a whole test."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        return np.asarray(values / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 1 + 0.1 * values)

    return jax.tree.map(draw, shapes)


def vqgan_params(config: FrozenVQGAN) -> dict:
    size = config.model.resolution
    model = VQGAN(config.model)
    return drawn(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"])


def pictures(number: int) -> list[Picture]:
    """Of many sizes; every third still encoded."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (20 + 3 * i, 44 - i, 3), np.uint8) for i in range(number)]
    return [encoded(each) if i % 3 == 0 else each for i, each in enumerate(pixels)]


def encoded(pixels: np.ndarray) -> Image:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return Image(file.getvalue())


class Fits:
    """Stand-ins for the two fits: they keep the documents that they are given, and make parameters of no training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[str, list[str]] = {}
        self.asked: dict[str, tuple[FrozenVQGAN | FrozenCLIP, int, DeviceMesh]] = {}
        self.read: set[str] = set()
        read, fit_text = World.read, TextTokenizer.fit

        def reading(world: World, data_dir: Path, shard: str):
            self.read.add(world.split)
            return read(world, data_dir, shard)

        def text(tokenizer: TextTokenizer, texts, folder: Path) -> None:
            texts = list(texts)
            self.given["text"] = texts
            fit_text(tokenizer, texts, folder)

        monkeypatch.setattr(World, "read", reading)
        monkeypatch.setattr(TextTokenizer, "fit", text)
        monkeypatch.setattr(encoders, "fit_vqgan", self.vqgan)
        monkeypatch.setattr(encoders, "fit_clip", self.clip)

    def vqgan(self, config: FrozenVQGAN, seed: int, mesh: DeviceMesh, documents: list[Document], folder: Path) -> dict:
        self.given["vqgan"] = [document.text for document in documents]
        self.asked["vqgan"] = (config, seed, mesh)
        (folder / "checkpoints").mkdir()
        return vqgan_params(config)

    def clip(
        self, config: FrozenCLIP, seed: int, mesh: DeviceMesh, documents: list[Document], folder: Path
    ) -> ClipCheckpoint:
        self.given["clip"] = [document.text for document in documents]
        self.asked["clip"] = (config, seed, mesh)
        (text,) = (folder.parents[1] / "text").glob(f"*/{MANIFEST}")
        tokenizer = TextTokenizer().load(text.parent)
        architecture = clip_config(config, tokenizer)
        size = architecture.vision_config.image_size
        ids, pixels = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, size, size, 3))
        shapes = jax.eval_shape(CLIP(architecture).init, jax.random.key(0), ids, jnp.ones((1, 4), bool), pixels)[
            "params"
        ]
        return ClipCheckpoint(architecture, drawn(shapes), tokenizer, IMAGES)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    return Fits(monkeypatch)


class SeenError(Exception):
    """Ends a fitting, with what it is given."""


@pytest.mark.parametrize(("stage", "each"), [("vqgan", 1), ("clip", 2), ("text", 2)])
def test_each_encoder_reads_its_own_number_of_documents_evenly(
    stage: str, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Six for the VQGAN and twelve for CLIP, of six shards; the text tokenizer reads as many as the one with more."""
    world = World(seen=4, unseen=4, documents_per_entity=4, questions_per_entity=1, documents_per_shard=4)
    memory = replace(world, split="memory", documents_per_shard=8)
    tiny = tiny_config.get_config()
    experiment = replace(
        tiny,
        data=replace(tiny.data, train=world, memory={"memory": memory}),
        vqgan=replace(tiny.vqgan, fit=FitConfig(steps=1, max_documents=6)),
        clip=replace(tiny.clip, fit=FitConfig(steps=1, max_documents=12)),
    )
    found: dict[str, list[str]] = {}

    def fit(name: str) -> Any:
        def see(*arguments: Any) -> None:
            found[name] = [document.key for document in arguments[3]]
            raise SeenError

        return see

    def fit_text(self: TextTokenizer, texts: Any, folder: Path) -> None:
        found["text"] = list(texts)
        raise SeenError

    monkeypatch.setattr(encoders, "fit_vqgan", fit("vqgan"))
    monkeypatch.setattr(encoders, "fit_clip", fit("clip"))
    monkeypatch.setattr(TextTokenizer, "fit", fit_text)
    for name in {"text", "vqgan", "clip"} - {stage}:
        with Workdir(tmp_path, "tiny").write(getattr(encoders.recipes, name)(experiment)):
            pass
    with pytest.raises(SeenError):
        encoders.fit_encoders(Run(experiment, Workdir(tmp_path, "tiny")))
    shards = [(source, shard) for source in (world, memory) for shard in source.shards(tmp_path)]
    assert len(shards) == 6
    expected = [document for source, shard in shards for document in list(source.read(tmp_path, shard))[:each]]
    assert found[stage] == [document.text if stage == "text" else document.key for document in expected]


@pytest.mark.parametrize("fit_on", [("train", "memory"), ("train",)])
def test_no_held_out_document_is_read_while_encoders_are_fitted(fits: Fits, tmp_path: Path, fit_on: tuple[str, ...]):
    experiment = replace(TINY, data=replace(TINY.data, fit_on=fit_on))
    fit_encoders(Run(experiment, Workdir(tmp_path / "runs", "tiny")))
    assert fits.read == set(fit_on)
    held_out = {
        item.text
        for split in ("validation", "test")
        for item in World.read(getattr(TINY.data, split), Path(), "000000")
    }
    assert not held_out & {text for given in fits.given.values() for text in given}


def test_a_withdrawn_part_of_the_memory_has_been_fitted_on(fits: Fits, tmp_path: Path):
    """It still decides what the encoders are."""
    experiment = replace(TINY, data=replace(TINY.data, fit_on=("memory",), withdrawn=("memory",)))
    fit_encoders(Run(experiment, Workdir(tmp_path / "runs", "tiny")))
    assert fits.read == {"memory"}


def test_encoders_are_fitted_as_the_experiment_says(fits: Fits, tmp_path: Path):
    experiment = replace(TINY, seed=TINY.seed + 3, mesh=MeshConfig(data=2, fsdp=4))
    fit_encoders(Run(experiment, Workdir(tmp_path / "runs", "tiny")))
    mesh = experiment.mesh.build()
    assert fits.asked == {
        "vqgan": (experiment.vqgan, experiment.seed, mesh),
        "clip": (experiment.clip, experiment.seed, mesh),
    }


def test_only_what_is_missing_is_fitted(fits: Fits, tmp_path: Path):
    workdir = Workdir(tmp_path / "runs", "tiny")
    fit_encoders(Run(TINY, workdir))
    assert not list((tmp_path / "runs").rglob("checkpoints"))
    fits.given, fits.read = {}, set()
    fit_encoders(Run(TINY, workdir))
    assert (fits.given, fits.read) == ({}, set())
    other = replace(TINY, clip=replace(TINY.clip, max_logit_scale=7.0))
    fit_encoders(Run(other, workdir))
    assert list(fits.given) == ["clip"]


def test_a_checkpoint_that_is_broken_fails_before_anything_is_fitted(fits: Fits, tmp_path: Path):
    (tmp_path / "clip").mkdir()
    experiment = replace(TINY, clip=replace(TINY.clip, checkpoint=str(tmp_path / "clip")))
    with pytest.raises(InputError, match=r"clip' has no config\.json"):
        fit_encoders(Run(experiment, Workdir(tmp_path / "runs", "tiny")))
    assert (fits.given, fits.read) == ({}, set())


def test_what_is_opened_is_what_was_fitted_in_the_dtype_of_the_config(fits: Fits, tmp_path: Path):
    model = replace(TINY.vqgan.model, dropout=0.25, attn_resolutions=(10,), ch_mult=(1, 2), patch_size=2, n_embed=24)
    experiment = replace(TINY, vqgan=replace(TINY.vqgan, model=model))
    half = replace(
        experiment,
        vqgan=replace(experiment.vqgan, dtype="bfloat16"),
        clip=replace(experiment.clip, dtype="bfloat16"),
    )
    workdir = Workdir(tmp_path / "runs", "tiny")
    fit_encoders(Run(experiment, workdir))
    assert Run(experiment, workdir).tokenizer.decode(Run(experiment, workdir).tokenizer.encode(TEXTS[0])) == TEXTS[0]

    codes = np.random.default_rng(0).integers(0, model.n_embed, (3, model.tokens_per_image))
    drawn_in = {}
    for dtype, one in (("float32", experiment), ("bfloat16", half)):
        codec = Run(one, workdir).images
        assert codec.config == model
        assert (codec.codebook_size, codec.tokens_per_image, codec.resolution) == (24, 100, 40)
        decode = jax.jit(partial(VQGAN(model, dtype).apply, method="decode"))
        plain = np.asarray(decode({"params": vqgan_params(experiment.vqgan)}, codes))
        drawn_in[dtype] = codec.decode(codes)
        # rounded after sums that may be taken in another order, in bfloat16 with 8 bits of mantissa
        error = np.abs(drawn_in[dtype] - (np.clip(plain, -1, 1) + 1) * 127.5)
        assert error.max() < 0.51 if dtype == "float32" else error.mean() < 0.51
    assert np.mean(drawn_in["float32"] != drawn_in["bfloat16"]) > 0.1

    exact, rough = (Run(one, workdir).encoder.embed_texts(TEXTS) for one in (experiment, half))
    assert 1e-4 < np.abs(exact - rough).max() < 0.05


def test_a_checkpoint_is_converted_at_the_resolution_of_the_config(
    fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("vqgan.ckpt", "vqgan.yaml"):
        (tmp_path / name).write_text("not read here")
    path, loaded = tmp_path / "vqgan.ckpt", []
    config = replace(TINY.vqgan.model, ch_mult=(1, 2), resolution=24)

    def load(path: Path, resolution: int | None) -> VQGANCheckpoint:
        loaded.append((path, resolution))
        return VQGANCheckpoint(config, vqgan_params(TINY.vqgan), "some family")

    monkeypatch.setattr(encoders, "load_vqgan", load)
    experiment = replace(TINY, vqgan=replace(TINY.vqgan, checkpoint=str(path), resolution=24))
    workdir = Workdir(tmp_path / "runs", "tiny")
    fit_encoders(Run(experiment, workdir))
    assert loaded == [(path, 24)]
    assert "vqgan" not in fits.given
    assert Run(experiment, workdir).images.config == config


@pytest.fixture(scope="module")
def codec() -> VQGANCodec:
    """A codec that takes 8 pictures at a time, whose codes are vectors of pictures, so that all are in use."""
    params = vqgan_params(TINY.vqgan)
    pixels = np.stack([prepare_image(pixels_of(image), 40) for image in pictures(8)]) / np.float32(127.5) - 1
    latents = jax.jit(partial(VQGAN(TINY.vqgan.model).apply, method="latents"))({"params": params}, pixels)
    rows = np.asarray(latents).reshape(-1, TINY.vqgan.model.embed_dim)
    params["codebook"] = {"embedding": np.random.default_rng(0).permutation(rows)[: TINY.vqgan.model.n_embed]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rac3.vqgan.codec.PIXELS_AT_ONCE", 40**2 // 2)  # one for each device all the same
        return VQGANCodec(VQGAN(TINY.vqgan.model), params)


def test_codes_and_pictures_are_those_of_the_model_one_by_one(codec: VQGANCodec):
    model, params = VQGAN(TINY.vqgan.model), {"params": jax.device_get(codec._params)}
    encode, decode = (jax.jit(partial(model.apply, method=method)) for method in ("encode", "decode"))
    images = pictures(11)  # a full batch and a remainder
    codes = codec.encode(images)
    assert codes.shape == (11, model.config.tokens_per_image)
    drawn = codec.decode(codes)
    assert (drawn.shape, drawn.dtype) == ((11, 40, 40, 3), np.uint8)
    assert len(np.unique(codes, axis=0)) == 11
    for image, row, picture in zip(images, codes, drawn, strict=True):
        pixels = prepare_image(pixels_of(image), 40)[None].astype(np.float32) / 127.5 - 1
        # an encoder of random weights has some vectors midway between two codes
        assert np.mean(row == encode(params, pixels)[0]) > 0.95
        expected = (np.clip(np.asarray(decode(params, row[None]))[0], -1, 1) + 1) * 127.5
        np.testing.assert_allclose(picture, expected, atol=0.51)
    assert codec.encode([]).shape == (0, model.config.tokens_per_image)
    assert codec.decode(codes[:0]).shape == (0, 40, 40, 3)
