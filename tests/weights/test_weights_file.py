"""Weights in shards that an index lists, and under names that torch's wrappers changed."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rac3.config import InputError
from rac3.weights.checkpoint_files import plain_names
from rac3.weights.weights_file import read_weights, shards

ONE, TWO, OLD = np.float32([1, 1]), np.float32([2, 2]), np.float32([9, 9])


def write_index(folder: Path, places: dict[str, object]) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return index


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_index_decides_which_file_a_weight_comes_from(tmp_path: Path, order: tuple[str, str]):
    """Each file has an old copy of the weight of the other."""
    first, second = (f"{name}.safetensors" for name in order)
    save_file({"x": ONE, "y": OLD, "unlisted": OLD}, tmp_path / first)
    save_file({"y": TWO, "x": OLD}, tmp_path / second)
    found = read_weights(write_index(tmp_path, {"x": first, "y": second}))
    assert {name: array.tolist() for name, array in found.items()} == {"x": [1, 1], "y": [2, 2]}


def test_a_weight_that_is_not_where_the_index_says(tmp_path: Path):
    save_file({"x": ONE}, tmp_path / "a.safetensors")
    save_file({"y": TWO}, tmp_path / "b.safetensors")
    index = write_index(tmp_path, {"x": "a.safetensors", "y": "a.safetensors"})
    with pytest.raises(
        InputError, match=r"a\.safetensors' lacks 'y', which model\.safetensors\.index\.json says it has"
    ):
        read_weights(index)
    assert list(read_weights(index, lambda name: name == "x")) == ["x"]
    with pytest.raises(InputError) as error:
        read_weights(write_index(tmp_path, {"y" * 5000: "a.safetensors"}))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a" * 256, 7, None]
)
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, file: object):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.safetensors", folder / "sub" / "a.safetensors"):
        save_file({"x": ONE}, path)
    index = write_index(folder, {"x": file})
    for read in (read_weights, shards):
        with pytest.raises(InputError, match="which is no file next to it"):
            read(index)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("index", [False, True])
def test_the_prefixes_of_wrappers_are_dropped(tmp_path: Path, prefix: str, index: bool):
    save_file({f"{prefix}a.x": ONE, f"{prefix}b.y": TWO}, tmp_path / "a.safetensors")
    file = tmp_path / "a.safetensors"
    if index:
        file = write_index(tmp_path, dict.fromkeys((f"{prefix}a.x", f"{prefix}b.y"), "a.safetensors"))
    assert set(read_weights(file)) == {"a.x", "b.y"}
    assert set(read_weights(file, lambda name: name.startswith("b."))) == {"b.y"}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_index_decides_among_torch_files_too(tmp_path: Path, prefix: str):
    torch = pytest.importorskip("torch")
    torch.save({f"{prefix}x": torch.tensor(ONE), f"{prefix}y": torch.tensor(OLD)}, tmp_path / "a.bin")
    torch.save({f"{prefix}y": torch.tensor(TWO), f"{prefix}x": torch.tensor(OLD)}, tmp_path / "b.bin")
    found = read_weights(write_index(tmp_path, {f"{prefix}x": "a.bin", f"{prefix}y": "b.bin"}))
    assert {name: array.tolist() for name, array in found.items()} == {"x": [1, 1], "y": [2, 2]}


def test_names_that_are_no_wrappers_stay():
    assert plain_names(["module.x", "y"]) == {"module.x": "module.x", "y": "y"}  # not all of them
    assert plain_names(["a._orig_mod.x", "a.y"]) == {"a._orig_mod.x": "a.x", "a.y": "a.y"}
    assert plain_names(["_orig_mod.x", "x"]) == {"_orig_mod.x": "_orig_mod.x", "x": "x"}  # two of one name
    assert plain_names([]) == {}


def test_types_that_numpy_lacks_cost_one_line_where_they_are_needed(tmp_path: Path):
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert list(read_weights(tmp_path / "a.safetensors", lambda name: name == "b")) == ["b"]
    with pytest.raises(InputError, match=r"'w' is of F8_E4M3; give weights that are not quantized"):
        read_weights(tmp_path / "a.safetensors")
