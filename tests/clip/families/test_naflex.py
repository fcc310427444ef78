"""SigLIP 2 NaFlex, with random weights, in the files of transformers: its vectors on squares."""

import json

import numpy as np
import pytest
from published_clips import images, module, pillow
from published_siglips import TEXT, TEXTS, VISION, assert_vectors, random_model, reference_ids, write_gemma

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.published import load_clip


def middle(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


@pytest.mark.parametrize("max_num_patches", [16, 30, 9])  # the positions' own grid of 4 x 4, 5 x 5, 3 x 3
def test_naflex_pipeline(max_num_patches, tmp_path):
    torch = module("torch")
    processors = module("transformers.models.siglip2.image_processing_pil_siglip2")
    write_gemma(tmp_path)
    model = random_model("Siglip2", TEXT | {"vocab_size": 330}, VISION | {"num_patches": 16})
    model.save_pretrained(tmp_path)
    settings = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 12, "max_num_patches": max_num_patches}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load_clip(str(tmp_path))
    encoder = loaded.encoder()

    ids = torch.tensor(reference_ids(tmp_path, TEXTS))  # in lower case by AutoTokenizer
    squares = [middle(image) for image in images() if min(image.shape[:2]) > 1]
    processor = processors.Siglip2ImageProcessorPil.from_pretrained(tmp_path)
    with torch.no_grad():
        texts = model.get_text_features(input_ids=ids).pooler_output
        pictures = model.get_image_features(**processor([pillow(image) for image in squares], return_tensors="pt"))
    assert_vectors(encoder.embed_texts(TEXTS), texts)
    assert_vectors(encoder.embed_images(squares), pictures.pooler_output)

    loaded.save(tmp_path / "saved")
    again = ClipCheckpoint.open(tmp_path / "saved")
    assert (again.config, again.images) == (loaded.config, loaded.images)
    np.testing.assert_array_equal(again.encoder().embed_images(images()), encoder.embed_images(images()))
