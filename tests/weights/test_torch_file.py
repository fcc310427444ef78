import io
import os
import pickle
import sys
import zipfile
from contextlib import nullcontext, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rac3.config import InputError
from rac3.weights.torch_file import read_state_dict, read_torch_file

torch = pytest.importorskip("torch")
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(path: Path, value: object, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def write_archive(path: Path, opcodes: bytes, storages: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """A file in the zip format whose pickle and storages are given."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", opcodes)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


class ClaimedTensor:
    """Pickled, it is a float32 tensor of storage "0" that says what a test wants it to say."""

    def __init__(
        self, elements: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], view: tuple | None = None
    ) -> None:
        self.elements, self.layout, self.view = elements, (offset, size, stride), view

    def pickle(self) -> bytes:
        claimed = self

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: object) -> object:
                whole = ("storage", torch.FloatStorage, "0", "cpu", claimed.elements)
                return (whole if claimed.view is None else (*whole, claimed.view)) if value == "STORAGE" else None

        class Call:
            def __reduce__(self) -> tuple:
                return torch._utils._rebuild_tensor_v2, ("STORAGE", *claimed.layout, False, None)

        stream = io.BytesIO()
        Pickler(stream, protocol=2).dump({"w": Call()})
        return stream.getvalue()


class Callback:
    """What a training framework leaves in its checkpoints."""

    def __init__(self) -> None:
        self.best = torch.ones(3)


class Touches(dict):
    """Makes the file when its state is set, or an item of it."""

    def __setstate__(self, path: str) -> None:
        Path(path).touch()

    def __setitem__(self, path: str, value: object) -> None:
        Path(path).touch()


class Harmful:
    """Unpickled, it would make a file; `how` says through what."""

    def __init__(self, path: Path, how: str) -> None:
        self.path, self.how = str(path), how

    def __reduce__(self) -> tuple:
        ways = {
            "command": (os.system, (f"touch {self.path}",)),
            "code": (exec, (f"import pathlib; pathlib.Path({self.path!r}).touch()",)),
            "state": (Touches, (), self.path),
            "item": (Touches, (), None, None, iter([(self.path, 1)])),
        }
        return ways[self.how]


@FORMATS
@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [
        ("float32", np.float32),
        ("float64", np.float64),
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("int64", np.int64),
        ("int32", np.int32),
        ("int16", np.int16),
        ("int8", np.int8),
        ("uint8", np.uint8),
        ("bool", np.bool_),
        ("complex64", np.complex64),
        ("complex128", np.complex128),
    ],
)
def test_round_trip(tmp_path: Path, zipped: bool, dtype: str, numpy_dtype: type):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (3, 4, 5)))
    tensor = values.to(getattr(torch, dtype))
    path = save(tmp_path / "w.pt", {"w": tensor, "scalar": tensor[0, 0, 0], "empty": tensor[:, :0]}, zipped)
    read = read_state_dict(path)
    assert read["w"].dtype == numpy_dtype
    np.testing.assert_array_equal(read["w"].astype(np.complex128), values.numpy())
    assert (read["scalar"].shape, read["empty"].shape) == ((), (3, 0, 5))
    np.testing.assert_array_equal(read["scalar"].astype(np.complex128), values[0, 0, 0].numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_protocol_of_pickle(tmp_path: Path, protocol: int):
    entries = {"state_dict": {"w": torch.eye(2), "v": torch.arange(3.0)}, "callback": Callback(), "lr": (0.1, [1, "a"])}
    torch.save(entries, tmp_path / "w.pt", pickle_protocol=protocol)
    found = read_torch_file(tmp_path / "w.pt")
    assert list(found.tensors) == ["w", "v"]
    np.testing.assert_array_equal(found.tensors["w"], np.eye(2))
    np.testing.assert_array_equal(found.tensors["v"], [0, 1, 2])
    assert f"{__name__}.Callback" in found.foreign


@FORMATS
def test_a_file_of_a_big_endian_machine(tmp_path: Path, zipped: bool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "byteorder", "big")
        path = save(tmp_path / "w.pt", {"w": torch.ones(2)}, zipped)
    with pytest.raises(InputError, match=r"w\.pt' were written by a big-endian machine"):
        read_state_dict(path)


@FORMATS
def test_views_of_a_shared_storage(tmp_path: Path, zipped: bool):
    whole = torch.arange(24.0).reshape(4, 6)
    views = {
        "whole": whole,
        "turned": whole.T,
        "part": whole[1:3, ::2],
        "row": whole[3],
        "wide": whole[0, :1].expand(5),
    }
    read = read_state_dict(save(tmp_path / "w.pt", views, zipped))
    assert list(read) == list(views)
    for name, tensor in views.items():
        np.testing.assert_array_equal(read[name], tensor.numpy())
    assert np.shares_memory(read["whole"], read["turned"])


@FORMATS
def test_modules_save_their_parameters_and_buffers(tmp_path: Path, zipped: bool):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict(keep_vars=True)
    assert isinstance(state["0.weight"], torch.nn.Parameter)
    read = read_state_dict(save(tmp_path / "w.pt", state, zipped))
    assert list(read) == list(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(read[name], tensor.detach().numpy())


def test_the_weights_are_found_in_the_usual_entries(tmp_path: Path):
    def first(**entries: object) -> float:
        return float(read_state_dict(save(tmp_path / "w.pt", entries))["w"])

    one, two, three = ({"w": torch.tensor(float(number))} for number in (1, 2, 3))
    assert first(ema=three, model=two, state_dict=one) == 1
    assert first(ema=three, model=two) == 2
    assert first(ema=three, epoch=4) == 3
    assert first(state_dict={"none": 0}, w=torch.tensor(4.0)) == 4


@FORMATS
def test_a_training_checkpoint_with_foreign_objects(tmp_path: Path, zipped: bool):
    checkpoint = {
        "callbacks": {Callback: {"best": Callback()}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "lr": np.float64(0.1)}],
        "loops": {"set": {1, 2}, "bytes": b"x", "frozen": frozenset({3}), "range": range(3), "path": tmp_path},
        "state_dict": {
            "w": torch.eye(2),
            "hidden": Callback(),
            "version": "1",
            "dtype": torch.float32,
            5: torch.ones(1),
        },
    }
    found = read_torch_file(save(tmp_path / "last.ckpt", checkpoint, zipped))
    assert list(found.tensors) == ["w"]
    np.testing.assert_array_equal(found.tensors["w"], np.eye(2))
    assert f"{__name__}.Callback" in found.foreign
    assert not any(name.startswith(("torch._utils", "collections.OrderedDict")) for name in found.foreign)


@FORMATS
@pytest.mark.parametrize("how", ["command", "code", "state", "item"])
def test_nothing_in_the_file_runs(tmp_path: Path, zipped: bool, how: str):
    trace = tmp_path / "trace"
    path = save(tmp_path / "w.pt", {"x": Harmful(trace, how), "state_dict": {"w": torch.ones(2)}}, zipped)
    assert list(read_state_dict(path)) == ["w"]
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so it would have


def test_a_foreign_object_in_the_place_of_a_tensor(tmp_path: Path):
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(InputError, match=r"'w' is made by torch\._utils\._rebuild_sparse_tensor, not a plain tensor"):
        read_state_dict(save(tmp_path / "w.pt", {"w": sparse, "v": torch.ones(1)}))
    with pytest.raises(InputError, match=r"a torch\.nn\.modules\.linear\.Linear object, not tensors by name"):
        read_state_dict(save(tmp_path / "w.pt", torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match="hold a Tensor, not tensors by name"):
        read_state_dict(save(tmp_path / "w.pt", torch.ones(2)))
    with pytest.raises(InputError, match="hold no tensors by name"):
        read_state_dict(save(tmp_path / "w.pt", {"epoch": 3}))


@FORMATS
def test_truncated_anywhere(tmp_path: Path, zipped: bool):
    data = save(tmp_path / "w.pt", {"a": torch.ones(40), "b": torch.ones(40)}, zipped).read_bytes()
    for length in range(16, len(data) - 1, 37):
        (tmp_path / "short.pt").write_bytes(data[:length])
        with pytest.raises(InputError, match=r"short\.pt.*(truncated|download it again)") as error:
            read_state_dict(tmp_path / "short.pt")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "are an empty file; download it again"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "are a web page, not weights"),
        (b"\n <html>", "are a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "are a Git LFS pointer"),
        (np.random.default_rng(0).bytes(1000), "are no torch.save file"),
        (pickle.dumps({"w": 1}), "are no torch.save file"),
        (b"PK" + np.random.default_rng(0).bytes(1000), "damaged or truncated"),
        (b"\x80\x02\x8a\x0a" + np.random.default_rng(0).bytes(1000), "damaged or truncated"),
    ],
)
def test_not_a_torch_file(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "w.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_state_dict(tmp_path / "w.ckpt")
    assert "\n" not in str(error.value)


def test_other_archives(tmp_path: Path):
    with pytest.raises(InputError, match="do not exist"):
        read_state_dict(tmp_path / "absent.pt")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("readme.txt", "weights")
    with pytest.raises(InputError, match=r"a zip archive without data\.pkl"):
        read_state_dict(tmp_path / "w.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"script/{name}", pickle.dumps(()))
    with pytest.raises(InputError, match="a TorchScript program"):
        read_state_dict(tmp_path / "script.pt")


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (ClaimedTensor(8, 0, (3, 3), (3, 1)), "'w' is damaged"),
        (ClaimedTensor(8, 8, (1,), (1,)), "'w' is damaged"),
        (ClaimedTensor(8, 7, (2,), (1,)), "'w' is damaged"),
        (ClaimedTensor(8, 4, (2,), (-1,)), "'w' is damaged"),
        (ClaimedTensor(8, -1, (2,), (1,)), "'w' is damaged"),
        (ClaimedTensor(8, 0, (2, 2), (1,)), "'w' is damaged"),
        (ClaimedTensor(8, 0, (2**40, 2**40), (1, 1)), "'w' is damaged"),
        (ClaimedTensor(8, 0, (2**40,), (0,)), "exceeds its file"),
        (ClaimedTensor(9, 0, (8,), (1,)), "'w' is damaged.*32 bytes for 9 float32"),
    ],
)
def test_a_tensor_that_lies_about_its_storage(tmp_path: Path, claim: ClaimedTensor, message: str):
    with pytest.raises(InputError, match=message):
        read_state_dict(write_archive(tmp_path / "w.pt", claim.pickle(), {"0": bytes(32)}))


def test_storages_that_lie(tmp_path: Path):
    honest = ClaimedTensor(8, 0, (2, 4), (4, 1)).pickle()
    assert read_state_dict(write_archive(tmp_path / "w.pt", honest, {"0": bytes(32)}))["w"].shape == (2, 4)
    with pytest.raises(InputError, match="damaged"):
        read_state_dict(write_archive(tmp_path / "w.pt", honest, {}))
    for view, message in ((None, ""), (("1", 4, 4), "an unknown kind of storage")):  # of torch before 0.4
        path = write_archive(tmp_path / "w.pt", ClaimedTensor(8, 0, (4,), (1,), view).pickle(), {"0": bytes(32)})
        with pytest.raises(InputError, match=message) if message else nullcontext():
            read_state_dict(path)
    with pytest.raises(InputError, match="is compressed, or larger than the file"):
        read_state_dict(write_archive(tmp_path / "w.pt", honest, {"0": bytes(32)}, zipfile.ZIP_DEFLATED))


def test_damaged_pickles_end_in_one_line(tmp_path: Path):
    """Every byte of the pickle replaced by some others: read or refused, but nothing else."""
    honest, rng = ClaimedTensor(8, 0, (2, 4), (4, 1)).pickle(), np.random.default_rng(0)
    for place in range(len(honest)):
        for value in rng.integers(0, 256, 4):
            changed = honest[:place] + bytes([value]) + honest[place + 1 :]
            write_archive(tmp_path / "w.pt", changed, {"0": bytes(32)})
            with suppress(InputError):
                read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/byteorder"])
def test_a_member_that_grows_is_not_unpacked(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """50 MB in a few kilobytes."""
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_BZIP2) as archive:
        for member in ("archive/data.pkl", "archive/byteorder"):
            archive.writestr(member, bytes(50_000_000) if member == name else b"")
    assert (tmp_path / "w.pt").stat().st_size < 10_000
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match="is compressed, or larger than the file"):
        read_state_dict(tmp_path / "w.pt")


def test_bit_flips_anywhere_are_one_line_or_nothing(tmp_path: Path):
    path = save(tmp_path / "w.pt", {"state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2)}})
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with suppress(InputError):
            read_state_dict(path)


def test_the_entries_are_tried_in_their_order(tmp_path: Path):
    path = save(tmp_path / "w.pt", {"model": {"w": torch.ones(1)}, "ema": {"module.w": torch.zeros(1)}, "ema_decay": 1})
    assert read_torch_file(path).entry == "model"
    found = read_torch_file(path, ("ema", "model"))
    assert (found.entry, {name: array.tolist() for name, array in found.tensors.items()}) == ("ema", {"w": [0]})
    assert read_torch_file(save(path, {"w": torch.ones(1)})).entry == ""
