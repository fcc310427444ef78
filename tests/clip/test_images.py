"""Files to squares, bit for bit as `transformers`' image processors make them on Pillow.

Where rac3 differs on purpose (transparency is shown on white, EXIF orientation is applied), the reference gets an image
to which the same was done.
"""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from published_clips import images, module, pillow

from rac3.clip.families import huggingface, naflex, openclip, siglip
from rac3.clip.images import ClipImages
from rac3.config import InputError
from rac3.documents.document import decode_image, prepare_image
from rac3.weights.settings import Settings

SIZES = ((37, 61), (61, 37), (36, 36), (13, 800), (400, 7), (1, 50), (71, 72), (37, 36), (1, 1))


def given(**settings: object) -> Settings:
    """The settings of an image processor."""
    return Settings(Path("here"), settings)


def noise(mode: str, size: tuple[int, int]) -> PIL.Image.Image:
    """Of (height, width); a palette has 50 colors."""
    rng = np.random.default_rng(0)
    if mode == "P":
        image = PIL.Image.fromarray(rng.integers(0, 50, size, np.uint8)).convert("P")
        image.putpalette(rng.integers(0, 256, 150).tolist())
        return image
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return PIL.Image.fromarray(rng.integers(0, 256, (*size, *channels), np.uint8))


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(image: PIL.Image.Image, orientation: int, kind: str) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


def opened(data: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(data))


CASES = {f"{height} x {width}": (encoded(noise("RGB", (height, width)), "png"), lambda i: i) for height, width in SIZES}
CASES |= {
    "grayscale": (encoded(noise("L", (37, 61)), "png"), lambda image: image),
    "grayscale jpeg": (encoded(noise("L", (37, 61)), "jpeg"), lambda image: image),
    "palette": (encoded(noise("P", (37, 61)), "png"), lambda image: image),
    "transparent palette": (encoded(noise("P", (37, 61)), "png", transparency=7), on_white),
    "RGBA": (encoded(noise("RGBA", (37, 61)), "png"), on_white),
    "RGBA webp": (encoded(noise("RGBA", (61, 37)), "webp", lossless=True), on_white),
    **{
        f"EXIF {orientation}": (rotated(noise("RGB", (37, 61)), orientation, "jpeg"), PIL.ImageOps.exif_transpose)
        for orientation in range(1, 9)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_clip(case):
    processors = module("transformers.models.clip.image_processing_pil_clip")
    data, differing = CASES[case]
    for size in (36, 37):
        reference = processors.CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size=size, do_rescale=False, do_normalize=False
        )
        expected = reference(differing(opened(data)), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(ClipImages().square(decode_image(data), size), expected)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("case", CASES)
def test_siglip(case, resample):
    processors = module("transformers.models.siglip.image_processing_pil_siglip")
    data, differing = CASES[case]
    number = PIL.Image.Resampling[resample.upper()]
    settings = {"size": {"height": 40, "width": 40}, "resample": int(number), "image_mean": 0.5, "image_std": 0.5}
    reference = processors.SiglipImageProcessorPil(**settings | {"do_rescale": False, "do_normalize": False})
    expected = reference(differing(opened(data)), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    kind = siglip.read_images(given(**settings), 40)
    np.testing.assert_array_equal(kind.square(decode_image(data), 40), expected)


def test_a_clip_that_is_fitted_here_crops_first():
    pixels = decode_image(CASES["37 x 61"][0])
    np.testing.assert_array_equal(ClipImages(steps="crop, scale").square(pixels, 16), prepare_image(pixels, 16))


def test_the_middle_square_starts_at_the_floor_or_at_an_even_pixel():
    """torchvision's `CenterCrop`, which OpenCLIP uses, starts at `int(round(rest / 2.0))`."""
    for rest, floor, even in ((1, 0, 0), (2, 1, 1), (3, 1, 2), (5, 2, 2)):
        for turned in (False, True):  # nothing is scaled: the shorter side is of the tower's size
            image = np.asarray(noise("RGB", (36 + rest, 36)))
            image = image.transpose(1, 0, 2) if turned else image
            for rounding, top in (("floor", floor), ("even", even)):
                expected = image[:, top : top + 36] if turned else image[top : top + 36]
                np.testing.assert_array_equal(ClipImages(rounding=rounding).square(image, 36), expected)


def test_what_a_processor_leaves_out_is_as_in_transformers():
    for name, kind, read in (
        ("clip", "CLIPImageProcessorPil", lambda settings: huggingface.read_images(settings, 224)),
        ("siglip", "SiglipImageProcessorPil", lambda settings: siglip.read_images(settings, 224)),
        ("siglip2", "Siglip2ImageProcessorPil", naflex.read_images),
    ):
        reference = getattr(module(f"transformers.models.{name}.image_processing_pil_{name}"), kind)()
        found = read(given())
        assert found == read(given(image_mean=None, resample=None))  # as old files have it
        assert found.mean == tuple(reference.image_mean)
        assert found.std == tuple(reference.image_std)
        assert found.resample.upper() == PIL.Image.Resampling(reference.resample).name


def test_what_open_clip_asks_for():
    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "size": [36, 36]}
    expected = ClipImages((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "scale, crop", "even")
    assert openclip.read_images(given(**settings), 36) == expected
    assert openclip.read_images(given(interpolation="random"), 36).resample == "bicubic"
    with pytest.raises(InputError, match=r"here: size=\[36, 36\] is another preprocessing"):
        openclip.read_images(given(**settings), 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, r"here: image_mean=\[0\.5, 0\.5\] is not three numbers"),
        ({"image_std": "0.5"}, "here: image_std='0.5' is not three numbers"),
        ({"image_std": [0.5, "x", 0.5]}, r"here: image_std=\[0\.5, 'x', 0\.5\] is not three numbers"),
        ({"image_std": 0}, r"std=\(0\.0, 0\.0, 0\.0\) must be 3 numbers each, std above 0"),
        ({"rescale_factor": 1.0}, r"rescale_factor=1\.0 is another preprocessing"),
        ({"rescale_factor": "1/255"}, "rescale_factor='1/255' is another preprocessing"),
        ({"do_normalize": False}, "do_normalize=False is another preprocessing"),
        ({"do_rescale": False}, "do_rescale=False is another preprocessing"),
        ({"do_resize": False}, "do_resize=False is another preprocessing"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    for read in (
        lambda: huggingface.read_images(given(**settings), 224),
        lambda: siglip.read_images(given(**settings), 224),
        lambda: naflex.read_images(given(**settings)),
    ):
        with pytest.raises(InputError, match=message):
            read()
    with pytest.raises(InputError, match="here: mean='x' is not three numbers"):
        openclip.read_images(given(mean="x"), 224)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClipImages(mean=(0.5,)), r"mean=\(0\.5,\)"),
        (lambda: ClipImages(resample="cubic"), "resample='cubic' is unknown; use one of nearest"),
        (lambda: huggingface.read_images(given(resample=9), 224), "resample=9 is no filter"),
        (lambda: huggingface.read_images(given(do_center_crop=False), 224), "do_center_crop=False is another"),
        (lambda: huggingface.read_images(given(crop_size=200), 224), r"crop_size=\[200, 200\] is another"),
        (
            lambda: siglip.read_images(given(size={"height": 224, "width": 200}), 224),
            "'width': 200} is another",
        ),
        (lambda: openclip.read_images(given(resize_mode="squash"), 224), "resize_mode='squash'"),
    ],
)
def test_bad_preprocessing(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize("size", [36, 37, 224])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_squares_are_those_of_the_references(size, resample):
    """Bit for bit: the same Pillow calls on the same sizes."""
    import PIL.Image

    processors = module("transformers.models.clip.image_processing_pil_clip")
    number = PIL.Image.Resampling[resample.upper()]
    processor = processors.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, do_rescale=False, do_normalize=False, resample=number
    )
    transforms = module("torchvision.transforms")
    scale = transforms.Resize(size, interpolation=transforms.InterpolationMode(resample))
    for image in images():
        expected = processor(pillow(image), return_tensors="np")["pixel_values"][0]
        found = ClipImages(resample=resample).square(image, size)
        np.testing.assert_array_equal(found, expected.transpose(1, 2, 0))
        other = np.asarray(transforms.CenterCrop(size)(scale(pillow(image))))
        np.testing.assert_array_equal(ClipImages(resample=resample, rounding="even").square(image, size), other)


def test_a_long_strip_stays_small():
    strip = np.random.default_rng(0).integers(0, 256, (2, 100_000, 3), np.uint8)
    middle = strip[:, 50_000 - 64 : 50_000 + 64]
    np.testing.assert_array_equal(ClipImages().square(strip, 224), ClipImages().square(middle, 224))
