"""A small folder in MS-COCO's layout, drawn here."""

import json
from pathlib import Path

import numpy as np

from rac3.documents.document import encode_png

ANNOTATIONS, IMAGES = "annotations/captions_val2014.json", "val2014"


def write_coco(folder: Path, pictures: dict[int, np.ndarray], captions: dict[int, list[str]]) -> None:
    """The annotations and the images, by their ids; neither is in the order of the ids."""
    (folder / IMAGES).mkdir(parents=True)
    (folder / ANNOTATIONS).parent.mkdir()
    images = []
    for id in sorted(captions, key=lambda id: id * 7 % 11):
        name = f"COCO_val2014_{id:012d}.png"
        images.append({"id": id, "file_name": name, "height": 8, "width": 8, "license": 1})
        if id in pictures:
            (folder / IMAGES / name).write_bytes(encode_png(pictures[id]))
    pairs = [(id, caption) for id, each in captions.items() for caption in each]
    annotations = [{"image_id": id, "id": 100 + n, "caption": caption} for n, (id, caption) in enumerate(pairs)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")
