"""Parameters on disk: bit for bit, whole or not at all."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rac3.config import InputError
from rac3.weights.params_file import load_params, save_params

PARAMS = {
    "a": {"b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "half": np.array([1.5, 2], jnp.bfloat16)},
    "scalar": np.float32(3),
    "empty": np.zeros((0, 2)),
    "turned": np.arange(6.0).reshape(2, 3).T,
}


def test_what_is_saved_is_loaded(tmp_path: Path):
    save_params(tmp_path / "vqgan.safetensors", PARAMS)
    loaded = load_params(tmp_path / "vqgan.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS)
    assert loaded["a"]["half"].dtype == jnp.bfloat16
    assert loaded["scalar"].shape == ()
    named = safetensors.numpy.load_file(tmp_path / "vqgan.safetensors")
    assert sorted(named) == ["a/b/kernel", "a/half", "empty", "scalar", "turned"]
    assert [p.name for p in tmp_path.iterdir()] == ["vqgan.safetensors"]


def test_a_killed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "vqgan.safetensors"
    save_params(path, PARAMS)

    def killed(arrays: dict, filename: Path) -> None:
        Path(filename).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_params(path, {"a": np.ones(3)})
    jax.tree.map(np.testing.assert_array_equal, load_params(path), PARAMS)


def test_unreadable_parameters_are_one_clear_line(tmp_path: Path):
    path = tmp_path / "vqgan.safetensors"
    save_params(path, PARAMS)
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:50], b"", b"not safetensors at all, but long enough to be read"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"vqgan\.safetensors.*(truncated|not safetensors)") as error:
            load_params(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="do not exist"):
        load_params(tmp_path / "nothing.safetensors")
