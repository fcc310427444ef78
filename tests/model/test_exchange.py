"""Models as folders: transformers' OPT has the logits of ours and ours has OPT's; what does not fit is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from exported_model import page_code
from plain_transformer import plain_logits, plain_turns, random_params
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.model import exchange
from rac3.model.transformer import Transformer, TransformerConfig
from rac3.run import initializer
from rac3.tokens.vocabulary import EOD, NUM_SPECIALS, Vocabulary
from rac3.weights import weights_file

CONFIG = TransformerConfig(
    num_layers=2, embed=32, num_heads=4, mlp=48, offset_embedding=False, dtype="float32", remat="none", init_std=0.2
)
VOCABULARY = Vocabulary(text_size=70, image_size=30)
POSITIONS, LONGEST = 20, 9
SEGMENTS = np.array([[1] * 7 + [2] * 5 + [3] * 8, [1] * 12 + [2] * 8])
PLACES = np.array([[*range(7), *range(5), *range(8)], [*range(12), *range(8)]])
EPS = 1e-5  # float32 sums of up to 128 terms in another order, of the largest logit


def model_of(config: TransformerConfig = CONFIG, positions: int = POSITIONS) -> Transformer:
    return config.build(VOCABULARY.padded_size, positions, LONGEST)


def shapes_of(model: Transformer) -> dict[str, tuple[int, ...]]:
    abstract = nn.unbox(jax.eval_shape(initializer(model), jax.random.key(0)))
    return {path: leaf.shape for path, leaf in exchange.parameters(abstract).items()}


def read(folder: Path, model: Transformer, vocabulary: Vocabulary = VOCABULARY) -> dict[str, Any]:
    """The parameters that a folder gives, over those of another seed."""
    found = exchange.read_pretrained(str(folder), model, shapes_of(model), vocabulary)
    return found.over(jax.tree.map(jax.numpy.asarray, random_params(model, seed=9)))


@pytest.fixture(scope="module", params=[(False, False), (True, False), (True, True)], ids=["opt", "own", "rotary"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model with random parameters, without offsets, with a table of them, and with rotary ones too; its folder."""
    table, rotary = request.param
    model = model_of(dataclasses.replace(CONFIG, offset_embedding=table, rotary_offsets=rotary))
    params, folder = random_params(model), tmp_path_factory.mktemp("exported")
    exchange.write_model(folder, model, params, VOCABULARY, {})
    return model, params, folder


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory):
    """transformers' OPT with random weights, all of them, and the folder that it wrote: 72 ids and 16 positions."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=72, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=16, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            weight.normal_(1.0 if "norm.weight" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("opt")
    peer.save_pretrained(folder)
    return peer, folder


@pytest.mark.parametrize("packed", [False, True])
def test_transformers_reads_an_export_and_has_its_logits(packed: bool, tmp_path: Path):
    """Plain sequences, and packed rows by position ids and a mask of four axes; ours in float64 by plain NumPy."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = model_of()
    params = random_params(model)
    exchange.write_model(tmp_path, model, params, VOCABULARY, {})
    peer, loading = transformers.OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.dtype == torch.float32
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}  # without it, versions of transformers refuse the file
    tokens = np.random.default_rng(0).integers(0, VOCABULARY.padded_size, (2, 20))
    segments, places = (SEGMENTS, PLACES) if packed else (np.ones_like(SEGMENTS), np.tile(np.arange(20), (2, 1)))
    rest: dict[str, Any] = {}
    if packed:
        seen = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((20, 20), bool))
        rest["position_ids"] = torch.tensor(places)
        rest["attention_mask"] = torch.tensor(np.where(seen, 0.0, -np.inf).astype(np.float32))[:, None]
    with torch.no_grad():
        theirs = peer.eval()(torch.tensor(tokens), **rest).logits.numpy()
    hidden = jax.jit(model.apply)(params, *(np.int32(x) for x in (tokens, places, 0 * places, segments)))
    ours = np.asarray(model.apply(params, hidden, method="logits"))
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=EPS * np.abs(ours).max())
    for row, segment in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)] if packed else [(0, 1), (1, 1)]:
        place = segments[row] == segment
        expected = plain_logits(params, 4, tokens[row, place])
        np.testing.assert_allclose(theirs[row, place], expected, rtol=0, atol=EPS * np.abs(expected).max())


@pytest.mark.parametrize("form", ["safetensors", "bin", "bare"])
def test_a_model_starts_as_the_opt_that_transformers_wrote(form: str, opt: Any, tmp_path: Path):
    """Its ids are ours of text, 8 further on, and its `</s>` is our `<eod>`; images, sentinels and offsets are new."""
    import torch

    peer, folder = opt
    if form != "safetensors":  # as facebook/opt-* have it; OPTModel writes names without the prefix
        state = {name.removeprefix("model." if form == "bare" else ""): x for name, x in peer.state_dict().items()}
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        folder = tmp_path
    model = model_of(dataclasses.replace(CONFIG, offset_embedding=True))
    params = read(folder, model)
    ids = np.random.default_rng(0).integers(3, 70, (1, 16))
    ids[0, 0] = peer.config.eos_token_id
    tokens = ids + NUM_SPECIALS
    tokens[0, 0] = EOD
    offsets = np.arange(16)[None] % (LONGEST + 1)
    places = np.arange(16)[None]
    hidden = jax.jit(model.apply)(params, *(np.int32(x) for x in (tokens, places, offsets, np.ones((1, 16)))))
    ours = np.asarray(model.apply(params, hidden, method="logits"))[0]
    with torch.no_grad():
        theirs = peer(torch.tensor(ids)).logits[0].numpy()
    np.testing.assert_allclose(ours[:, 8:78], theirs[:, :70], rtol=0, atol=EPS * np.abs(theirs).max())
    np.testing.assert_allclose(ours[:, EOD], theirs[:, 2], rtol=0, atol=EPS * np.abs(theirs).max())
    fresh = random_params(model, seed=9)["params"]
    new = np.r_[0, 2:8, 78 : VOCABULARY.padded_size]
    np.testing.assert_array_equal(params["params"]["token_embedding"][new], fresh["token_embedding"][new])
    np.testing.assert_array_equal(params["params"]["position_embedding"][16:], fresh["position_embedding"][16:])
    assert not np.any(params["params"]["offset_embedding"])


def test_what_is_exported_is_read_again_bit_for_bit(exported: Any):
    model, params, folder = exported
    jax.tree.map(np.testing.assert_array_equal, read(folder, model), params)


def test_parameters_keep_their_shardings(exported: Any):
    model, params, folder = exported
    mesh = MeshConfig(fsdp=2, tensor=2).build()
    abstract = mesh.abstract(jax.eval_shape(initializer(model), jax.random.key(0)))
    placed = jax.tree.map(lambda new, like: jax.device_put(0 * new, like.sharding), random_params(model), abstract)
    longer = model_of(model.config, POSITIONS + 4)  # some rows of a table stay
    table = jax.device_put(np.ones((POSITIONS + 4, 32), np.float32), mesh.sharding("positions", "embed"))
    for each in (model, longer):
        if each is longer:
            placed["params"]["position_embedding"] = table
        found = exchange.read_pretrained(str(folder), each, shapes_of(each), VOCABULARY).over(placed)
        jax.tree.map(lambda new, old: _assert_same_sharding(new, old), found, placed)
        kept = found["params"]["position_embedding"]
        np.testing.assert_array_equal(kept[:POSITIONS], params["params"]["position_embedding"])
        np.testing.assert_array_equal(kept[POSITIONS:], 1)


def _assert_same_sharding(new: jax.Array, old: jax.Array) -> None:
    assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


def test_a_shorter_context_leaves_the_last_positions_out(exported: Any):
    model, params, folder = exported
    shorter = read(folder, model_of(model.config, 12))
    np.testing.assert_array_equal(shorter["params"]["position_embedding"], params["params"]["position_embedding"][:12])


def test_large_models_are_written_in_shards(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the order of the tensors, each shard as full as it can be; the index is the one that the reader takes."""
    model, params, folder = exported
    whole = load_file(folder / "model.safetensors")
    limit = 20_000
    monkeypatch.setattr(weights_file, "SHARD_BYTES", limit)
    exchange.write_model(tmp_path, model, params, VOCABULARY, {})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert [path.name for path in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    sizes = [sum(array.nbytes for array in load_file(path).values()) for path in files]
    assert max(sizes) <= limit
    names = list(index["weight_map"])  # in the order of the tensors
    assert sorted(index["weight_map"].values()) == list(index["weight_map"].values())
    for size, path in zip(sizes, files[1:], strict=False):
        first = next(name for name in names if index["weight_map"][name] == path.name)
        assert size + whole[first].nbytes > limit
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values()) == sum(sizes)
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert not (tmp_path / "model.safetensors").exists()
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path, model), params)
    if model.config.offset_embedding:
        return
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    peer = transformers.OPTForCausalLM.from_pretrained(tmp_path)
    for name, weight in peer.state_dict().items():
        if name in whole:
            np.testing.assert_array_equal(weight.numpy(), whole[name])


def copied(folder: Path, target: Path, settings: dict[str, Any], **tensors: np.ndarray | None) -> Path:
    """A folder with other settings and tensors; None leaves one out."""
    weights = load_file(folder / "model.safetensors") | tensors
    save_file({name: each for name, each in weights.items() if each is not None}, target / "model.safetensors")
    stored = json.loads((folder / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps(stored))
    return target


FC1 = "model.decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"model_type": "gpt2"}, {}, "model_type='gpt2'"),
        ({"do_layer_norm_before": False}, {}, "do_layer_norm_before=False"),
        ({"activation_function": "gelu"}, {}, "activation_function='gelu'"),
        ({"tie_word_embeddings": False}, {}, "tie_word_embeddings=False"),
        ({"_remove_final_layer_norm": True}, {}, "_remove_final_layer_norm=True"),
        ({"hidden_size": 64}, {}, "hidden_size=64, but model.embed=32; set --model.embed 64"),
        ({"word_embed_proj_dim": 16}, {}, "word_embed_proj_dim=16"),
        ({"num_hidden_layers": 3}, {}, "set --model.num-layers 3"),
        ({"num_attention_heads": 8}, {}, "set --model.num-heads 8"),
        ({"ffn_dim": 64}, {}, "set --model.mlp 64"),
        ({"vocab_size": 300}, {}, "vocab_size=300 does not fit the 70 ids"),
        ({"vocab_size": 69}, {}, "vocab_size=69 does not fit the 70 ids"),
        ({"vocab_size": 73}, {}, "'model.decoder.embed_tokens.weight' has shape (72, 32), but the model asks for (73,"),
        ({"max_position_embeddings": 20}, {}, "has shape (18, 32), but the model asks for (22, 32)"),
        ({}, {FC1: None}, f"lack '{FC1}' of shape (48, 32)"),
        ({}, {FC1: np.zeros((32, 48), np.float32)}, f"'{FC1}' has shape (32, 48), but the model asks for (48, 32)"),
        ({}, {"model.decoder.project_in.weight": np.zeros((3, 3), np.float32)}, "have 'model.decoder.project_in.wei"),
        ({}, {"lm_head.weight": np.ones((72, 32), np.float32)}, "lm_head.weight differs"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    settings: dict[str, Any], tensors: dict[str, Any], message: str, opt: Any, tmp_path: Path
):
    folder = copied(opt[1], tmp_path, settings, **tensors)
    with pytest.raises(InputError) as error:
        read(folder, model_of())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_export_is_read_with_its_own_vocabulary_alone(exported: Any):
    model, _, folder = exported
    other = Vocabulary(text_size=60, image_size=40)
    assert other.padded_size == VOCABULARY.padded_size
    with pytest.raises(InputError, match=r"vocabulary is text_size 70, .* but this config has text_size 60"):
        read(folder, model, other)


@pytest.mark.parametrize(("table", "rotary"), [(True, False), (False, True), (True, True)])
def test_the_code_of_the_page_has_the_logits_of_plain_numpy(table: bool, rotary: bool, tmp_path: Path):
    model = model_of(dataclasses.replace(CONFIG, offset_embedding=table, rotary_offsets=rotary))
    params = random_params(model)
    exchange.write_model(tmp_path, model, params, VOCABULARY, {})
    rng, page = np.random.default_rng(0), page_code()
    tokens, offsets = rng.integers(0, 100, POSITIONS), rng.integers(0, LONGEST + 1, POSITIONS)
    turns = plain_turns(offsets, 8, LONGEST) if rotary else None
    expected = plain_logits(params, 4, tokens, offsets if table else None, turns)
    got = page["logits"](*page["load"](tmp_path), tokens, offsets)
    np.testing.assert_allclose(got, expected, rtol=0, atol=EPS * np.abs(expected).max())


def test_offsets_are_not_dropped_in_silence(exported: Any):
    model, _, folder = exported
    config = model.config
    if config.offset_embedding:
        with pytest.raises(InputError, match="have 'offset_embedding'"):
            read(folder, model_of(dataclasses.replace(CONFIG, rotary_offsets=config.rotary_offsets)))
    other = dataclasses.replace(config, rotary_offsets=not config.rotary_offsets)
    with pytest.raises(InputError, match=f"rotary_offsets={config.rotary_offsets}, but"):
        read(folder, model_of(other))
    if config.rotary_offsets:
        longer = config.build(VOCABULARY.padded_size, POSITIONS, LONGEST + 1)
        with pytest.raises(InputError, match=f"max_segment_tokens={LONGEST}, but {LONGEST + 1} here"):
            read(folder, longer)


def test_the_identity_of_a_folder_is_its_content(exported: Any, tmp_path: Path):
    """One number in the middle of the weights tells them apart; the name of the folder and other files do not."""
    _, _, folder = exported
    same, other = tmp_path / "same", tmp_path / "other"
    for each in (same, other):
        each.mkdir()
        copied(folder, each, {})
        (each / "config.json").write_text((folder / "config.json").read_text())
        (each / "README.md").write_text(str(each))
    content = bytearray((folder / "model.safetensors").read_bytes())
    (same / "model.safetensors").write_bytes(content)
    content[len(content) // 2] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert exchange.identity(str(same)) == exchange.identity(str(folder))
    assert exchange.identity(str(other)) != exchange.identity(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("facebook/opt-125m", "hf download facebook/opt-125m"),
        ("./nowhere", "'./nowhere' is not a folder"),
        ("/", "'/' lacks weights"),
    ],
)
def test_a_folder_that_is_not_there(source: str, message: str):
    with pytest.raises(InputError, match=message):
        exchange.identity(source)
