"""MS-COCO's layout: which images are documents, with which captions, and what is said of the others."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coco_folder import ANNOTATIONS, IMAGES, write_coco

from rac3.config import InputError
from rac3.documents.coco import Coco
from rac3.documents.document import Document, Reject, Source, Stored

IDS = range(10, 30)
SOURCE = Coco(ANNOTATIONS, IMAGES, shard_size=8)
CAPTIONS = {id: [f"picture {id} as {n}" for n in range(5)] for id in IDS}


def picture(id: int) -> np.ndarray:
    return np.full((8, 8, 3), id, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_coco(tmp_path, {id: picture(id) for id in IDS}, CAPTIONS)
    return tmp_path


def documents(source: Coco, folder: Path) -> list[Document]:
    found = [item for shard in source.shards(folder) for item in source.read(folder, shard)]
    assert all(isinstance(item, Document) for item in found)
    return found


def test_each_image_has_its_own_captions(folder: Path) -> None:
    assert isinstance(SOURCE, Source)
    assert isinstance(SOURCE, Stored)
    assert SOURCE.shards(folder) == ["000000000-000000008", "000000008-000000016", "000000016-000000020"]
    found = documents(SOURCE, folder)
    for id, document in zip(IDS, found, strict=True):
        assert document.key == f"COCO_val2014_{id:012d}.png"
        assert (document.images[0].pixels() == picture(id)).all()
        assert document.metadata == {"captions": CAPTIONS[id], "image_id": id}
        assert document.text in CAPTIONS[id]
    assert len(Counter(document.text[-1] for document in found)) > 2  # not always the first
    assert documents(SOURCE, folder) == found


def test_captions_and_images_are_drawn_by_the_seed(folder: Path) -> None:
    some = replace(SOURCE, documents=9)
    first, again, other = (documents(each, folder) for each in (some, some, replace(some, seed=1)))
    assert first == again
    assert len(first) == len(other) == 9
    ids = [[document.metadata["image_id"] for document in each] for each in (first, other)]
    assert ids[0] == sorted(ids[0])
    assert set(ids[0]) != set(ids[1])
    whole = {document.key: document.text for document in documents(SOURCE, folder)}
    assert all(whole[document.key] == document.text for document in first)  # of an image: by the seed and its id


def test_what_is_damaged_is_rejected_alone(folder: Path) -> None:
    content = json.loads((folder / ANNOTATIONS).read_text())
    names = {each["id"]: each for each in content["images"]}
    (folder / IMAGES / names[10]["file_name"]).unlink()
    (folder / IMAGES / names[11]["file_name"]).write_bytes(b"\x89PNG\r\n\x1a\n")
    names[12]["file_name"] = "../secret.png"
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 13]
    for each in content["annotations"]:
        each["caption"] = each["caption"] if each["image_id"] != 14 else "  \n"
    (folder / ANNOTATIONS).write_text(json.dumps(content))
    found = [item for shard in SOURCE.shards(folder) for item in SOURCE.read(folder, shard)]
    reasons = [item.reason.split(":")[0] for item in found if isinstance(item, Reject)]
    assert reasons == ["missing image", "truncated image", "no file name", "no caption", "no caption"]
    assert [item.metadata["image_id"] for item in found if isinstance(item, Document)] == [*range(15, 30)]


def test_a_change_of_the_files_is_noticed(folder: Path) -> None:
    before = documents(SOURCE, folder)
    assert SOURCE.files(folder) == [folder / ANNOTATIONS, folder / IMAGES]
    content = json.loads((folder / ANNOTATIONS).read_text())
    content["annotations"] = [each | {"caption": "another"} for each in content["annotations"]]
    (folder / ANNOTATIONS).write_text(json.dumps(content))
    assert {document.text for document in documents(SOURCE, folder)} == {"another"}
    assert len(before) == 20


def test_another_layout_is_refused_in_one_line(folder: Path) -> None:
    for source, said in (
        (replace(SOURCE, images="train2014"), r"image folder .*train2014' does not exist"),
        (replace(SOURCE, annotations="captions.json"), r"captions\.json' do not exist; give source\.annotations"),
        (replace(SOURCE, documents=21), r"source\.documents=21 exceeds the 20 images"),
    ):
        with pytest.raises(InputError, match=said):
            source.shards(folder)
    for content in ("[]", "{}", '{"images": []', '{"images": [{"id": 1}], "annotations": []}'):
        (folder / ANNOTATIONS).write_text(content)
        with pytest.raises(InputError, match=r"are not COCO's captions"):
            SOURCE.shards(folder)
    orphan = {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "b"}]}
    (folder / ANNOTATIONS).write_text(json.dumps(orphan))
    with pytest.raises(InputError, match=r"KeyError: 2"):
        SOURCE.shards(folder)
    (folder / ANNOTATIONS).write_text('{"images": [], "annotations": []}')
    with pytest.raises(InputError, match="name no images"):
        SOURCE.shards(folder)
    with pytest.raises(InputError, match=r"source\.documents=-1"):
        Coco(documents=-1)
