"""Every usual form of an image arrives as the same RGB image; every broken one is refused by name."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from seg4diff.images import as_list, as_rgb, check_header

# 2 rows of 3 pixels: red, green, blue / black, white, grey
PIXELS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [128, 128, 128]]], np.uint8
)
GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
CHANNELS_FIRST = PIXELS.transpose(2, 0, 1).copy()


def same(image: Image.Image, expected: np.ndarray) -> bool:
    assert image.mode == "RGB"
    if expected.ndim == 2:
        expected = np.repeat(expected[:, :, None], 3, axis=2)
    return np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(Image.fromarray(PIXELS), PIXELS, id="pil"),
        pytest.param(PIXELS, PIXELS, id="uint8"),
        pytest.param(PIXELS.astype(np.uint16) * 257, PIXELS, id="uint16"),
        pytest.param((PIXELS.astype(np.uint16) * 257).astype(">u2"), PIXELS, id="uint16 big-endian"),
        pytest.param(PIXELS / 255, PIXELS, id="float64"),
        pytest.param((PIXELS / 255).astype(np.float16), PIXELS, id="float16"),
        pytest.param(PIXELS / 255 * 1.001, PIXELS, id="rounds to 255"),
        pytest.param(np.asfortranarray(PIXELS)[::-1], PIXELS[::-1], id="strided"),
        pytest.param(GREY, GREY, id="grey"),
        pytest.param(GREY[:, :, None], GREY, id="grey, one channel"),
        pytest.param(GREY > 100, np.where(GREY > 100, 255, 0), id="bool"),
        pytest.param(torch.from_numpy(CHANNELS_FIRST), PIXELS, id="tensor uint8"),
        pytest.param(torch.from_numpy(CHANNELS_FIRST) / 255, PIXELS, id="tensor float32"),
        pytest.param((torch.from_numpy(CHANNELS_FIRST) / 255).bfloat16()[:, :1], PIXELS[:1], id="bfloat16"),
        pytest.param((torch.from_numpy(CHANNELS_FIRST) / 255).requires_grad_(), PIXELS, id="requires grad"),
        pytest.param(torch.from_numpy(GREY), GREY, id="tensor grey"),
        pytest.param(torch.from_numpy(GREY)[None], GREY, id="tensor grey, one channel"),
        pytest.param(torch.from_numpy(GREY.astype(np.uint16) * 257), GREY, id="tensor uint16"),
        pytest.param(Image.fromarray(GREY), GREY, id="L"),
        pytest.param(Image.fromarray(GREY).convert("P"), GREY, id="P"),
        pytest.param(Image.fromarray(PIXELS).convert("CMYK"), PIXELS, id="CMYK"),
        pytest.param(Image.fromarray(GREY > 100), np.where(GREY > 100, 255, 0), id="1"),
        pytest.param(Image.fromarray(GREY.astype(np.uint16) * 257), GREY, id="I;16"),
        pytest.param(Image.fromarray(GREY.astype(np.int32) * 257), GREY, id="I"),
        pytest.param(Image.fromarray(GREY.astype(np.float32) / 255), GREY, id="F"),
        pytest.param(PIXELS[:1, :1], PIXELS[:1, :1], id="one pixel"),
        pytest.param(torch.ones(1, 1), np.full((1, 1), 255), id="one pixel, tensor"),
    ],
)
def test_forms(given, expected):
    assert same(as_rgb(given), expected)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.dstack([PIXELS, np.full((2, 3), 0, np.uint8)])),
        Image.fromarray(np.dstack([GREY, np.full((2, 3), 0, np.uint8)]), mode="LA"),
        Image.fromarray(np.dstack([PIXELS, np.full((2, 3), 0, np.uint8)])).convert("RGBa"),
    ],
    ids=["RGBA", "LA", "RGBa"],
)
def test_transparent_pixels_are_white(image):
    assert same(as_rgb(image), np.full((2, 3, 3), 255))


def test_a_url_is_not_fetched() -> None:
    with pytest.raises(ValueError, match=r"image 'https://a.org/b.jpg' is a URL.*download it first"):
        as_rgb("https://a.org/b.jpg")


def test_half_transparent_pixels_are_half_white():
    image = np.dstack([PIXELS, np.full((2, 3), 128, np.uint8)])
    expected = PIXELS * (128 / 255) + 255 * (127 / 255)
    for given in (image, Image.fromarray(image), torch.from_numpy(image.transpose(2, 0, 1) / 255)):
        assert np.abs(np.asarray(as_rgb(given)) - expected).max() <= 1


def test_transparent_palette_colour_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png", transparency=0)
    assert same(as_rgb(tmp_path / "palette.png"), np.array([[[255, 255, 255], [40, 50, 60]]]))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp"])
def test_paths(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(PIXELS).save(path, lossless=True)
    assert same(as_rgb(path), PIXELS)
    assert same(as_rgb(str(path)), PIXELS)


def test_16_bit_png(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert same(as_rgb(tmp_path / "deep.png"), GREY)


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    assert np.abs(np.asarray(as_rgb(tmp_path / "print.jpg"), int) - [255, 0, 0]).max() <= 4


def test_exif_orientation_of_files(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    assert same(as_rgb(tmp_path / "turned.png"), np.rot90(PIXELS, -1))


def test_the_result_is_independent_of_the_argument():
    given = Image.fromarray(PIXELS)
    result = as_rgb(given)
    given.putpixel((0, 0), (1, 2, 3))
    assert same(result, PIXELS)


def bomb(path):
    """A small PNG whose header promises 900 million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))))


def test_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png.*check the path"):
        as_rgb(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="is a folder"):
        as_rgb(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png.*convert it"):
        as_rgb(tmp_path / "text.png")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match="empty.jpg"):
        as_rgb(tmp_path / "empty.jpg")
    bomb(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb.png.*suspiciously large.*MAX_IMAGE_PIXELS"):
        as_rgb(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".gif"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.3, 0.7):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=f"cut{suffix}"):
            as_rgb(path)
        lazily = path.read_bytes()
        if suffix in (".png", ".jpg") and share == 0.7:  # opened by the caller, found damaged by us
            with Image.open(path) as opened, pytest.raises(ValueError, match="cannot be decoded"):
                as_rgb(opened)
        assert path.read_bytes() == lazily


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.full((2, 2, 3), np.nan), ValueError, "12 NaN or infinite"),
        (torch.full((3, 2, 2), float("inf")), ValueError, "12 NaN or infinite"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), ValueError, "4 NaN"),
        (PIXELS.astype(np.float32), ValueError, "from 0 to 255.*divide by 255"),
        (torch.from_numpy(CHANNELS_FIRST) / 127.5 - 1, ValueError, r"from -1 to 1.*\(x \+ 1\) / 2"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty"),
        (torch.zeros(3, 4, 0), ValueError, "empty"),
        (Image.new("RGB", (0, 5)), ValueError, "empty"),
        (np.zeros(5, np.uint8), ValueError, r"\[height, width\]"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"shape \[4, 4, 5\]"),
        (CHANNELS_FIRST[:, :, :2], ValueError, r"transpose\(1, 2, 0\)"),
        (torch.zeros(5, 5, 3), ValueError, r"permute\(2, 0, 1\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, r"shape \[1, 4, 4, 3\]"),
        (PIXELS.astype(np.int64), TypeError, "int64"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, "int32"),
        (np.zeros((2, 2), complex), TypeError, "complex"),
        (Image.fromarray(np.array([[-1, 70000]], np.int32)), ValueError, "from -1 to 70000"),
        (b"bytes", TypeError, "bytes"),
        (None, TypeError, "NoneType"),
    ],
)
def test_bad_pictures(given, error, message):
    with pytest.raises(error, match=message):
        as_rgb(given)


def test_one_or_several(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for single in (PIXELS, Image.fromarray(PIXELS), torch.from_numpy(CHANNELS_FIRST), tmp_path / "a.png"):
        images, one = as_list(single)
        assert one is True
        assert len(images) == 1
        assert same(images[0], PIXELS)
    for several in (
        [PIXELS, str(tmp_path / "a.png")],
        (Image.fromarray(PIXELS), torch.from_numpy(CHANNELS_FIRST)),
        np.stack([PIXELS, PIXELS]),
        torch.from_numpy(np.stack([CHANNELS_FIRST, CHANNELS_FIRST])),
    ):
        images, one = as_list(several)
        assert one is False
        assert len(images) == 2
        assert all(same(image, PIXELS) for image in images)
    assert as_list([PIXELS])[1] is False


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 4, 4, 3), np.uint8), torch.zeros(0, 3, 4, 4)])
def test_no_picture(nothing):
    with pytest.raises(ValueError, match="images is empty"):
        as_list(nothing)


def test_errors_in_lists_say_which(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images\[1\]: .*gone.png"):
        as_list([PIXELS, tmp_path / "gone.png"])
    with pytest.raises(ValueError, match=r"images\[0\]: .*NaN"):
        as_list(torch.full((2, 3, 4, 4), float("nan")))
    with pytest.raises(TypeError, match=r"images\[0\]"):
        as_list([[PIXELS]])


def test_a_header_is_checked_without_decoding(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    check_header(path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png' is not an image that Pillow can read"):
        check_header(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_header(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="URLs are not fetched"):
        check_header("https://a.org/b.jpg")
