"""A dataset of TensorFlow Datasets, written and read without TensorFlow."""

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rac3.config import InputError
from rac3.documents.document import Document, Reject, Source
from rac3.documents.tfds import Tfds

COUNT = 7


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def png(index: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels(index)).save(file, "PNG")
    return file.getvalue()


def example(index: int) -> dict[str, object]:
    captions = [{"text": f"photo {index} {j}é".encode(), "id": 10 * index + j} for j in range(2)]
    return {
        "image": png(index),
        "label": index % 3 - 1,  # -1: not labelled
        "captions": captions,
        "texts": [f"text {index}"],
        "title": f"title {index}",
        "score": 0.25 * index,
        "raw": pixels(index),
        "nested": {"picture": png(index + 100), "alt": "alt"},
        "frames": [png(index + 200), png(index + 300)],
        "mask": np.zeros((3, 3, 2), np.uint8),
    }


DAMAGE: dict[int, tuple[str, object, str]] = {
    1: ("image", png(1)[:60], "truncated image"),
    2: ("title", b"caf\xe9 \xff", "undecodable text"),
    4: ("captions", [], "missing text"),
    5: ("image", b"", "empty image"),
}


def write_tiny(folder: Path) -> None:
    """Write the dataset `tiny` with two splits: `train` is intact, `damaged` has the defects in DAMAGE."""
    import tensorflow_datasets as tfds

    kinds = tfds.features

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = kinds.FeaturesDict(
                {
                    "image": kinds.Image(),
                    "label": kinds.ClassLabel(names=["cat", "dog"]),
                    "captions": kinds.Sequence({"text": kinds.Text(), "id": np.int64}),
                    "texts": kinds.Sequence(kinds.Text()),
                    "title": kinds.Text(),
                    "score": np.float32,
                    "raw": kinds.Tensor(shape=(6, 8, 3), dtype=np.uint8),
                    "nested": {"picture": kinds.Image(), "alt": kinds.Text()},
                    "frames": kinds.Sequence(kinds.Image()),
                    "mask": kinds.Tensor(shape=(3, 3, 2), dtype=np.uint8),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, object]]]]:
            damaged = [example(i) for i in range(COUNT)]
            for index, (feature, value, _) in DAMAGE.items():
                damaged[index][feature] = value
            return {"train": ((i, example(i)) for i in range(COUNT)), "damaged": iter(enumerate(damaged))}

        def _generate_examples(self) -> None: ...

    tfds.disable_progress_bar()
    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    write_tiny(folder)
    return folder


def read(source: Tfds, folder: Path) -> tuple[dict[str, Document], dict[str, str]]:
    """Documents and reject reasons by key, over all shards."""
    items = [item for shard in source.shards(folder) for item in source.read(folder, shard)]
    documents = {item.key: item for item in items if isinstance(item, Document)}
    rejects = {item.key: item.reason for item in items if isinstance(item, Reject)}
    assert len(documents) + len(rejects) == len(items)
    return documents, rejects


def test_it_is_a_source():
    assert isinstance(Tfds("tiny"), Source)


def test_documents_keep_the_encoded_image_and_all_metadata(folder):
    documents, rejects = read(Tfds("tiny", text="captions/text"), folder)
    assert rejects == {}
    assert list(documents) == [f"train/{i}" for i in range(COUNT)]
    for index, document in enumerate(documents.values()):
        assert document.images[0].data == png(index)
        assert document.text == f"photo {index} 0é"
        assert document.metadata == {
            "label": [None, "cat", "dog"][index % 3],
            "captions": {
                "text": [f"photo {index} 0é", f"photo {index} 1é"],
                "id": [10 * index, 10 * index + 1],
            },
            "texts": [f"text {index}"],
            "title": f"title {index}",
            "score": 0.25 * index,
            "nested": {"alt": "alt"},
        }


@pytest.mark.parametrize(
    ("text", "expected"), [("title", "title 1"), ("texts", "text 1"), ("label", "cat"), ("nested/alt", "alt")]
)
def test_every_kind_of_text(folder, text, expected):
    assert read(Tfds("tiny", text=text), folder)[0]["train/1"].text == expected


def test_a_label_that_is_not_set_is_a_missing_text(folder):
    assert read(Tfds("tiny", text="label"), folder)[1] == {f"train/{i}": "missing text" for i in (0, 3, 6)}


@pytest.mark.parametrize(("image", "seed"), [("image", 0), ("raw", 0), ("nested/picture", 100), ("frames", 200)])
def test_every_kind_of_image(folder, image, seed):
    documents, _ = read(Tfds("tiny", image=image), folder)
    for index in range(COUNT):
        np.testing.assert_array_equal(documents[f"train/{index}"].images[0].pixels(), pixels(seed + index))


def test_texts_alone_and_images_alone(folder):
    texts, images = read(Tfds("tiny", image=None, text="title"), folder)[0], read(Tfds("tiny"), folder)[0]
    assert texts["train/3"].images == ()
    assert texts["train/3"].text == "title 3"
    assert images["train/3"].text == ""
    with pytest.raises(InputError, match="both None"):
        Tfds("tiny", image=None)


def test_shards_are_ranges_that_together_are_the_split(folder):
    source = Tfds("tiny", text="title", shard_size=3)
    shards = source.shards(folder)
    assert shards == ["000000000-000000003", "000000003-000000006", "000000006-000000007"] == sorted(shards)
    assert [item.key for item in source.read(folder, shards[1])] == ["train/3", "train/4", "train/5"]
    assert read(source, folder) == read(Tfds("tiny", text="title"), folder)
    with pytest.raises(InputError, match="shard_size=0"):
        Tfds("tiny", shard_size=0)


def test_a_slice_of_a_split(folder):
    documents, _ = read(Tfds("tiny", split="train[2:4]", text="title"), folder)
    assert {key: document.text for key, document in documents.items()} == {
        "train[2:4]/0": "title 2",
        "train[2:4]/1": "title 3",
    }


def test_a_large_image_is_a_bomb_only_over_the_limit(folder):
    assert len(read(Tfds("tiny", max_pixels=6 * 8), folder)[0]) == COUNT
    documents, rejects = read(Tfds("tiny", max_pixels=6 * 8 - 1), folder)
    assert documents == {}
    assert set(rejects.values()) == {"decompression bomb: 8x6 exceeds 47 pixels"}


@pytest.mark.parametrize("text", ["title", "captions/text"])
def test_damage_is_a_reject_and_the_others_live(folder, text):
    documents, rejects = read(Tfds("tiny", split="damaged", text=text), folder)
    expected = {f"damaged/{i}": why for i, (name, _, why) in DAMAGE.items() if name in ("image", text.split("/")[0])}
    assert {key: reason.split(":")[0] for key, reason in rejects.items()} == expected
    assert len(documents) == COUNT - len(expected)


def test_a_damaged_record_is_a_reject(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("tiny/1.0.0/*train.array_record*")
    data = bytearray(file.read_bytes())
    data[5000] ^= 0xFF  # inside one of the seven records of over 1,000 bytes each, which have checksums
    file.write_bytes(data)
    documents, rejects = read(Tfds("tiny", text="title"), tmp_path)
    (reason,) = rejects.values()
    assert reason.startswith("unreadable example: ")
    assert len(documents) == COUNT - 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "nope"}, "'nope' is not prepared in .*holds: tiny/1.0.0; run `tfds build nope"),
        ({"name": "not a name!"}, "is not prepared in"),
        ({"name": "tiny:2.0.0"}, "is not prepared in"),
        ({"split": "test"}, r"no split 'test': .*; its splits \(examples\): .*train \(7\)"),
        ({"split": "train[:99]"}, r"no split 'train\[:99\]'"),
        ({"split": "train[2:2]"}, r"no split 'train\[2:2\]': .* 0 length; its splits"),
        ({"image": "picture"}, r"no feature source.image='picture'; it has: .*image.*nested/picture"),
        ({"text": "captions/caption"}, r"no feature source.text='captions/caption'; it has: .*captions/text"),
        ({"image": "title"}, "source.image='title' is a Text; .*one of: frames, image, nested/picture, raw$"),
        ({"image": "mask"}, "source.image='mask' is a Tensor"),
        ({"text": "score"}, "source.text='score' is a .*; .*one of: captions/text, label, nested/alt, texts, title$"),
        ({"text": "captions"}, "source.text='captions' is a Sequence"),
        ({"folder": "elsewhere"}, "is not prepared in"),
    ],
)
def test_input_errors_are_one_line_with_the_fix(folder, fields, message):
    with pytest.raises(InputError, match=message) as error:
        Tfds(**{"name": "tiny", **fields}).shards(folder)
    assert "\n" not in str(error.value)


def test_a_format_that_only_tensorflow_reads_is_an_input_error(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"stored as tfrecord.*array_record"):
        Tfds("tiny").shards(tmp_path)


def test_tensorflow_is_never_imported(folder):
    read(Tfds("tiny", text="title"), folder)
    assert "tensorflow" not in sys.modules


def test_reading_a_config_imports_nothing_heavy():
    code = (
        "import sys, rac3.documents.tfds, rac3.documents.webdataset\n"
        "print([m for m in ('tensorflow_datasets', 'pyarrow', 'array_record', 'jax') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
