"""Images in any of the usual forms become 8-bit RGB PIL images, or an error that names the image."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageInput: TypeAlias = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]

# Raised by Pillow's decoders for damaged files, besides OSError.
_DECODER_ERRORS = (SyntaxError, EOFError, ValueError, IndexError, TypeError, struct.error, zlib.error)


def as_rgb(image: ImageInput) -> Image.Image:
    """The image as an RGB PIL image of 8 bits a channel, at its own size.

    Args:
        image: one of

            * a path: any format that Pillow reads, the first frame of several, upright by its EXIF tag;
            * a PIL image of any mode, taken as it is. Transparency is laid on white. ``"I;16"`` and ``"I"``
              hold 16-bit values, as Pillow reads 16-bit greyscale files; ``"F"`` holds values in [0, 1];
            * a numpy array [height, width] or [height, width, 1 | 3 | 4];
            * a tensor [height, width] or [1 | 3 | 4, height, width], on any device.

            Arrays and tensors are uint8, uint16, bool, or floating point in [0, 1].

    Raises:
        FileNotFoundError: the path leads nowhere.
        ValueError: the text is a URL, the file is unreadable, truncated or too large to be safe, or an array
            has another shape, is empty, or holds NaN, infinity or values out of range.
        TypeError: the argument is none of the above, or an array has another dtype.
    """
    if isinstance(image, (str, os.PathLike)):
        _refuse_url(image)
        return _flatten(_open(Path(image)), f"image {os.fspath(image)!r}")
    if isinstance(image, Image.Image):
        name = f"PIL image of mode {image.mode!r} and size {image.width} x {image.height}"
        source = getattr(image, "filename", "")
        return _flatten(image, f"{name} from {source!r}" if source else name)
    if isinstance(image, np.ndarray):
        name = f"numpy array of shape {list(image.shape)} and dtype {image.dtype}"
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            hint = ""
            if image.ndim == 3 and image.shape[0] in (1, 3, 4):
                hint = "; transpose it with array.transpose(1, 2, 0)"
            raise ValueError(
                f"{name} is not an image: [height, width] or [height, width, 1 | 3 | 4] expected{hint}"
            )
        return _from_array(image, name)
    if isinstance(image, torch.Tensor):
        name = f"tensor of shape {list(image.shape)} and dtype {image.dtype}"
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] not in (1, 3, 4)):
            hint = ""
            if image.ndim == 3 and image.shape[2] in (1, 3, 4):
                hint = "; permute it with tensor.permute(2, 0, 1)"
            raise ValueError(
                f"{name} is not an image: [height, width] or [1 | 3 | 4, height, width] expected{hint}"
            )
        pixels = image.detach().cpu()
        if pixels.is_floating_point():
            pixels = pixels.float()
        elif pixels.dtype not in (torch.uint8, torch.uint16, torch.bool):
            raise TypeError(_wrong_dtype(name))
        return _from_array((pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels).numpy(), name)
    raise TypeError(
        f"image={_shorten(image)} is a {type(image).__name__}: "
        "a path, PIL image, numpy array or tensor expected"
    )


def as_list(images: ImageInput | Sequence[ImageInput]) -> tuple[list[Image.Image], bool]:
    """One or several images as a list of RGB PIL images, and whether a single one was given.

    Args:
        images: one image (see :func:`as_rgb`), or a list or tuple of them, or an array [batch, height,
            width, channels] or tensor [batch, channels, height, width].

    Raises:
        ValueError, TypeError, FileNotFoundError: as :func:`as_rgb`, with the position of the image; or
            the list is empty.
    """
    several = isinstance(images, (list, tuple)) or (
        isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    )
    if not several:
        return [as_rgb(cast(ImageInput, images))], True
    batch = cast(Sequence[ImageInput], images)
    if len(batch) == 0:
        raise ValueError("images is empty: at least one image is needed")
    converted = []
    for position, image in enumerate(batch):
        try:
            converted.append(as_rgb(image))
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise type(error)(f"images[{position}]: {error}") from error
    return converted, False


def check_header(path: str | os.PathLike[str]) -> None:
    """Check that a file is an image, from its header, without decoding it.

    Raises:
        ValueError, FileNotFoundError: as :func:`as_rgb`; damage behind the header is not found.
    """
    _refuse_url(path)
    with _named_errors(Path(path)), Image.open(path):
        pass


def _refuse_url(path: str | os.PathLike[str]) -> None:
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", str(path)):
        raise ValueError(f"image {path!r} is a URL, and URLs are not fetched; download it first")


def _open(path: Path) -> Image.Image:
    """The file's image, decoded and upright."""
    with _named_errors(path), Image.open(path) as file:
        file.load()
        # exif_transpose returns a copy also where nothing was to be turned, so the file may be closed.
        return ImageOps.exif_transpose(file)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system and of Pillow with the file's name and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"image {str(path)!r} does not exist; check the path") from None
    except IsADirectoryError:
        raise ValueError(
            f"image {str(path)!r} is a folder; give the images in it, such as {path}/*.jpg"
        ) from None
    except PermissionError:
        raise ValueError(f"image {str(path)!r} may not be read; check its permissions") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"image {str(path)!r} is not an image that Pillow can read; convert it to PNG or JPEG"
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"image {str(path)!r} is suspiciously large ({error}); make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except (OSError, *_DECODER_ERRORS) as error:
        raise ValueError(
            f"image {str(path)!r} is damaged or truncated ({error}); get a whole copy of it"
        ) from error


def _flatten(image: Image.Image, name: str) -> Image.Image:
    """RGB on white, from any mode of Pillow."""
    if image.width == 0 or image.height == 0:
        raise ValueError(f"{name} is empty: at least one pixel is needed")
    try:
        image.load()
    except (OSError, *_DECODER_ERRORS) as error:
        raise ValueError(f"{name} cannot be decoded ({error}); get a whole copy of it") from error
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        if image.mode == "I":
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError(
                    f"{name} holds values from {pixels.min()} to {pixels.max()}: 16-bit values in [0, 65535] "
                    "expected; scale it first"
                )
            pixels = pixels.astype(np.uint16)
        return _from_array(pixels, name)
    if image.has_transparency_data:
        straight = {"RGBa": "RGBA", "La": "LA"}.get(image.mode, image.mode)  # undo premultiplied alpha
        return _on_white(image.convert(straight).convert("RGBA"))
    # A copy also of an RGB image: results keep the image, whatever the caller does to it later.
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    """RGB from [height, width] or [height, width, 1 | 3 | 4] of uint8, uint16, bool or floats in [0, 1]."""
    if pixels.size == 0:
        raise ValueError(f"{name} is empty: at least one pixel is needed")
    if pixels.dtype == np.bool_:
        eight_bit = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint8:
        eight_bit = pixels
    elif pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        eight_bit = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif pixels.dtype.kind == "f":
        eight_bit = _from_floats(pixels, name)
    else:
        raise TypeError(_wrong_dtype(name))
    if eight_bit.ndim == 3 and eight_bit.shape[2] == 1:
        eight_bit = eight_bit[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(eight_bit))
    return _on_white(image) if image.mode == "RGBA" else image.convert("RGB")


def _from_floats(pixels: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(pixels).all():
        count = int(pixels.size - np.isfinite(pixels).sum())
        raise ValueError(
            f"{name} holds {count} NaN or infinite values; replace them, e.g. with numpy.nan_to_num"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if low < -1 / 510 or high > 1 + 1 / 510:  # further out than what still rounds to 0 or 255
        remedy = "divide by 255" if low >= 0 else "map [-1, 1] to it with (x + 1) / 2"
        raise ValueError(f"{name} holds values from {low:g} to {high:g}: values in [0, 1] expected; {remedy}")
    return np.rint(pixels.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)


def _wrong_dtype(name: str) -> str:
    return f"{name} is not an image: uint8, uint16, bool, or floating point in [0, 1] expected; convert it"


def _shorten(value: object, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
