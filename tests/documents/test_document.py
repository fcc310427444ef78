"""Documents, and decoding of every kind of image in web data, intact and damaged."""

import io
import json
import struct
import zlib
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from rac3.documents.document import (
    Document,
    Image,
    ImageError,
    SampleError,
    Source,
    Text,
    decode_image,
    decode_text,
    encode_png,
    frame,
    framed,
    framed_place,
    image_size,
    plain_json,
    prepare_image,
)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: PIL.Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def bomb_png(width: int, height: int) -> bytes:
    """A valid header with a correct checksum, and hardly any pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 64))]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_document_keeps_order_and_joins_text():
    image = Image(encode(noise(4, 5)))
    document = Document("0", (Text("a cat"), image, Text("and a dog")), {"similarity": 0.3, "tags": ["a"]})
    assert document.text == "a cat and a dog"
    assert document.images == (image,)
    assert Document("1", (image,), {}).text == ""
    np.testing.assert_array_equal(image.pixels(), noise(4, 5))


@pytest.mark.parametrize("segments", [(), (Text("a"), Text("b")), (Image(b"x"), Text("a"), Text("b"))])
def test_document_without_segments_or_with_split_text_names_its_key(segments):
    with pytest.raises(ValueError, match="'00000/7'"):
        Document("00000/7", segments, {})


def test_text_is_not_empty():
    with pytest.raises(ValueError, match="at least one character"):
        Text("")


def test_source_is_a_protocol_that_both_methods_satisfy():
    class Empty:
        def shards(self, data_dir: Path): ...
        def read(self, data_dir: Path, shard: str): ...

    assert isinstance(Empty(), Source)
    assert not isinstance(object(), Source)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(kind, options):
    np.testing.assert_array_equal(decode_image(encode(noise(17, 9), kind, **options)), noise(17, 9))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGBA", "PA", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = PIL.Image.new("RGB", (6, 4), (200, 30, 30)).convert(mode if mode != "PA" else "P")
    if mode == "PA":
        data = encode(image, transparency=bytes([255] * 256))  # alpha per palette entry, which makes Pillow warn
    else:
        data = encode(
            image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG", **({"quality": 95} if mode == "CMYK" else {})
        )
    pixels = decode_image(data)
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_allclose(
        pixels.astype(int), expected, atol=4 if mode in ("CMYK", "YCbCr") else 0
    )  # jpeg is lossy


def test_sixteen_bit_gray_keeps_its_range():
    gray = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(decode_image(encode(gray)), np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, -1))


def test_transparency_is_on_white():
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[:, :, 3] = [0, 255, 51]  # clear, solid, one fifth
    expected = np.broadcast_to(np.uint8([[255, 255, 255], [255, 0, 0], [255, 204, 204]]), (2, 3, 3))
    np.testing.assert_array_equal(decode_image(encode(pixels)), expected)
    keyed = encode(PIL.Image.new("RGB", (3, 2), (9, 8, 7)), transparency=(9, 8, 7))  # one color is transparent
    np.testing.assert_array_equal(decode_image(keyed), np.full((2, 3, 3), 255, np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    smooth = PIL.Image.fromarray(noise(2, 3)).resize((24, 16))
    data = encode(smooth, kind, exif=exif)
    with PIL.Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(kind):
    first, second = PIL.Image.fromarray(noise(4, 6)), PIL.Image.new("RGB", (6, 4), "red")
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    np.testing.assert_array_equal(decode_image(data), noise(4, 6))


def test_damaged_exif_costs_nothing_and_warns_of_nothing():
    clean, damaged = (
        encode(noise(8, 8), "JPEG"),
        encode(noise(8, 8), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0\x12\x01"),
    )
    np.testing.assert_array_equal(decode_image(damaged), decode_image(clean))


HTML = b"<!DOCTYPE html><title>404</title>"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (HTML, "not an image: "),
        (b"GIF89a" + bytes(32), "not an image: "),
        (encode(noise(32, 32))[:500], "truncated image: "),
        (encode(noise(32, 32))[:12], "truncated image: "),
        (encode(noise(32, 32), "JPEG")[:500], "truncated image: "),
        (encode(noise(32, 32), "WEBP")[:200], "truncated image: "),
        (encode(noise(32, 32), "WEBP")[:9], "truncated image: "),
        (b"RIFF\x10\0\0\0WAVEfmt ", "truncated image: "),
        (bomb_png(20000, 20000), "decompression bomb: 20000x20000 exceeds 89478485 pixels"),
        (bomb_png(10000, 10000), "decompression bomb: 10000x10000 exceeds 89478485 pixels"),
    ],
)
def test_damage_has_one_line_and_a_category(data, reason):
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert str(error.value).startswith(reason)
    assert "\n" not in str(error.value)


def test_the_limit_of_pixels_is_inclusive():
    data = encode(noise(10, 10))
    assert decode_image(data, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ImageError, match="decompression bomb: 10x10 exceeds 99 pixels"):
        decode_image(data, max_pixels=99)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 91), (91, 64)])
def test_an_image_of_the_right_size_is_only_cropped(height, width):
    pixels = noise(height, width)
    top, left = (height - 64) // 2, (width - 64) // 2
    np.testing.assert_array_equal(prepare_image(pixels, 64), pixels[top : top + 64, left : left + 64])


@pytest.mark.parametrize(("height", "width", "size"), [(96, 128, 24), (40, 20, 40), (512, 64, 16)])
def test_prepare_is_resize_then_crop(height, width, size):
    """The other order gives the same pixels, up to one level of rounding."""
    pixels = noise(height, width)
    scale = size / min(height, width)
    wide, tall = round(width * scale), round(height * scale)
    resized = PIL.Image.fromarray(pixels).resize((wide, tall), PIL.Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (tall - size) // 2
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    np.testing.assert_allclose(prepare_image(pixels, size).astype(int), expected, atol=1)


def test_downscaling_is_antialiased():
    """jax's antialiased cubic (a = -0.5, as Pillow's) is the oracle; without antialiasing the error is over 50."""
    pixels = noise(64, 64)
    expected = jax.image.resize(pixels.astype(np.float32), (16, 16, 3), "cubic", antialias=True)
    np.testing.assert_allclose(prepare_image(pixels, 16), np.clip(expected, 0, 255), atol=1.5)  # two roundings


def test_text_is_stripped_utf8():
    assert decode_text("\ufeff a cat, zōri \n".encode()) == "a cat, zōri"
    with pytest.raises(SampleError, match=r"^undecodable text: .* at byte 4"):
        decode_text(b"caf \xe9 \xff")
    with pytest.raises(SampleError, match=r"^empty text$"):
        decode_text(b" \t\n")


def test_plain_json():
    value = {
        "i": np.int32(3),
        "f": np.float32(0.5),
        "nan": float("nan"),
        "inf": np.float64("inf"),
        "b": np.bool_(True),
        "list": (np.arange(2), [None, "x"]),
        "bytes": b"caf\xc3\xa9",
        "surrogate": "a\ud800",
        7: {"d": np.datetime64("2020-01-02")},
    }
    assert plain_json(value) == {
        "i": 3,
        "f": 0.5,
        "nan": None,
        "inf": None,
        "b": True,
        "list": [[0, 1], [None, "x"]],
        "bytes": "café",
        "surrogate": "a?",
        "7": {"d": "2020-01-02"},
    }
    assert json.dumps(plain_json([True, np.bool_(False), 1])) == "[true, false, 1]"  # True == 1, but not as JSON


def test_frames_by_hand():
    """A red row above a green one, between them two columns of each."""
    red, green = [200, 0, 0], [0, 100, 0]
    wide = np.array([[red, red, red, red], [green, green, green, green]], np.uint8)
    white, mean = [255] * 3, [100, 50, 0]
    np.testing.assert_array_equal(frame(wide, "pad-white"), np.array([[white] * 4, *wide.tolist(), [white] * 4]))
    np.testing.assert_array_equal(frame(wide, "pad-border"), np.array([[mean] * 4, *wide.tolist(), [mean] * 4]))
    assert frame(wide, "crop") is wide
    tall = frame(wide.transpose(1, 0, 2), "pad-white")
    np.testing.assert_array_equal(tall, frame(wide, "pad-white").transpose(1, 0, 2))
    rows, columns = framed_place(2, 4)
    np.testing.assert_array_equal(frame(wide, "pad-white")[rows, columns], wide)
    odd = frame(wide[:1], "pad-white")
    np.testing.assert_array_equal(odd[1], wide[0])  # three rows are left over: one above, two below
    assert odd.shape == (4, 4, 3)


def test_a_long_strip_is_framed_in_bounded_memory(monkeypatch):
    monkeypatch.setattr("rac3.documents.document.PADDED_SIDE", 8)
    framed_strip = frame(np.zeros((1, 8000, 3), np.uint8), "pad-white")
    assert framed_strip.shape == (8, 8, 3)
    assert (framed_strip == 0).all(axis=(1, 2)).sum() == 1


def test_images_are_framed_where_they_are_decoded_and_the_file_stays():
    data = encode_png(np.zeros((2, 5, 3), np.uint8))
    document = Document("a", (Text("x"), Image(data), Image(data)), {})
    assert framed(document, "crop") is document
    padded = framed(document, "pad-white")
    assert [image.pixels().shape for image in padded.images] == [(5, 5, 3)] * 2
    assert [image.data for image in padded.images] == [data] * 2
    assert image_size(data) == (5, 2)
    with pytest.raises(ImageError):
        image_size(b"GIF89a")
