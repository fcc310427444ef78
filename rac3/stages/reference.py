"""Reference: what the pictures of a held-out split look like to a network and to the encoder.

Every model is compared with the same real pictures, so their features are made once.
"""

import io
from collections.abc import Sequence

import numpy as np

from rac3 import recipes
from rac3.artifacts.workdir import write_atomic
from rac3.documents.document import Image, prepare_image
from rac3.execution.progress import Progress
from rac3.experiment import Split
from rac3.held_out import PART_DOCUMENTS, SPLITS, part_rows
from rac3.run import Run


def reference(run: Run, splits: Sequence[Split] = SPLITS) -> None:
    """Makes the references of the held-out splits where `evaluation.features` names a network; a kill costs a part.

    The artifact holds, for each part of the documents, `features-PART.npy` and `vectors-PART.npy`: those of the first
    image of each document that has one.

    Raises:
      InputError: the network's weights are missing or damaged.
    """
    for split in splits if run.experiment.evaluation.features else ():
        recipe = run.recipe(recipes.reference, split) if split in run.experiment.data.sources() else None
        if recipe is None or run.workdir.find(recipe) is not None:
            continue
        network, size = run.features, run.images.resolution
        with run.workdir.write(recipe) as draft:
            documents = run.documents(split)
            count = min(len(documents), run.experiment.evaluation.documents)
            parts, pictures = part_rows(count, PART_DOCUMENTS), 0
            with Progress(f"reference of {split}", len(parts), "parts") as bar:
                for part, rows in enumerate(parts):
                    file = draft.folder / f"vectors-{part:05}.npy"
                    if not file.is_file():
                        items = documents.many(rows)
                        images: list[Image] = [item.document.images[0] for item in items if item.document.images]
                        real = [prepare_image(image.pixels(), size) for image in images]
                        vectors = run.encoder.embed_images(real) if real else np.zeros((0, run.encoder.width))
                        write_atomic(draft.folder / f"features-{part:05}.npy", _bytes(network.embed(real).features))
                        write_atomic(file, _bytes(vectors.astype(np.float32)))
                    pictures += len(np.load(file, mmap_mode="r", allow_pickle=False))
                    bar.update()
            draft.counts |= {"images": pictures}


def _bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
