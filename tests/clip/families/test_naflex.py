"""SigLIP 2 NaFlex, with random weights, in the files of transformers: its vectors on squares; and what is refused."""

import json

import numpy as np
import pytest
from published_clips import edit, images, in_section, module, pillow
from published_siglips import TEXT, TEXTS, VISION, assert_vectors, random_model, reference_ids, write_gemma

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.published import load_clip
from rac3.config import InputError


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


BROKEN = {
    "another patch size": (
        lambda f: (edit(f / "config.json", model_type="siglip2"), edit(f / "preprocessor_config.json", patch_size=9)),
        r"vision_config\.patch_size=12 is not 9, the processor's in preprocessor_config\.json",
    ),
    "positions that are no square": (
        lambda f: (
            edit(f / "config.json", model_type="siglip2"),
            in_section("vision_config", num_patches=8)(f),
            edit(f / "preprocessor_config.json", patch_size=12),
        ),
        "num_patches=8 is not a square number",
    ),
    "patches of no size": (
        lambda f: (
            edit(f / "config.json", model_type="siglip2"),
            edit(f / "preprocessor_config.json", patch_size=12, max_num_patches=0),
        ),
        "'max_num_patches': 0.* must be at least 1 each",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case, siglip_copy):
    break_it, message = BROKEN[case]
    break_it(siglip_copy)
    with pytest.raises(InputError, match=message) as error:
        load_clip(str(siglip_copy))
    assert "\n" not in str(error.value)
    assert str(siglip_copy) in str(error.value)
