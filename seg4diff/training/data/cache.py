"""Images, masks and captions as the transformer takes them: encoded once, kept in sealed files.

Encoding precedes training, so that neither VAE nor text encoders occupy memory while it runs. A cache that
is stale, cut off or half built is completed before use.

A cache is a folder of shards. A shard is a safetensors file with an identity in its header: a hash of the
encoders' weights, the data set's files and every setting that decides what is stored. Its last 32 bytes are
the SHA-256 of all before them. A process compares that hash when it first uses the shard. At the start only
sizes, identities and descriptions are compared: a cache of a large data set has hundreds of gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from seg4diff.backbones import Pipeline, find_backbone
from seg4diff.backbones.identity import encoders_identity
from seg4diff.backbones.text import find_words
from seg4diff.data.examples import Example, fingerprint, read_example
from seg4diff.data.items import Item, UnusableItemError
from seg4diff.data.registry import Dataset
from seg4diff.data.settings import DataSettings
from seg4diff.files import SEAL_BYTES, DamagedFileError, read_sealed, write_sealed
from seg4diff.jobs import lock
from seg4diff.masks import decode_mask, run_lengths
from seg4diff.segmentation.prompts import plan_prompts

logger = logging.getLogger(__name__)

_FORMAT = "seg4diff-magnet-encodings-3"
_MASK_SIDE = 256  # masks are kept at the image's resolution, but no larger than this
_THUMBNAIL = 128
_SEAL = "~seal"  # the tensor that ends a shard; safetensors sorts by dtype, then by name
_OPEN_FILES = 32
CUT_OFF = "class words cut off by the length of a prompt"


@dataclass(frozen=True)
class EncodedText:
    """One prompt of an image.

    Attributes:
        text: the prompt.
        content: text columns of its words, without begin, end and padding.
        classes: text columns of every class name that occurs in it.
        arguments: the transformer's text arguments, without the batch axis.
    """

    text: str
    content: tuple[int, ...]
    classes: Mapping[str, tuple[int, ...]]
    arguments: dict[str, Tensor]


@dataclass(frozen=True)
class Description:
    """What is known of an encoded image without reading its tensors.

    Attributes:
        name: of the image.
        classes: the name of each mask, or `""`.
        masks: run-length encodings (pycocotools), all of one size.
        texts: its prompts: text, content columns, columns by class, shapes by argument.
    """

    name: str
    classes: tuple[str, ...]
    masks: tuple[dict[str, Any], ...]
    texts: tuple[dict[str, Any], ...]


class Encodings:
    """A complete cache, open for reading. Pickles, so that processes can read ahead.

    Its methods raise DamagedFileError, with the remedy, where a shard is not as it was written.
    """

    def __init__(self, shards: Sequence[_Shard], empty: _Shard) -> None:
        self.descriptions = [description for shard in shards for description in shard.descriptions]
        self.skipped = sum((shard.skipped for shard in shards), Counter[str]())
        self._places = [(shard.path, row) for shard in shards for row in range(len(shard.descriptions))]
        self._empty = empty

    def __len__(self) -> int:
        return len(self.descriptions)

    def latents(self, index: int) -> Tensor:
        """Clean latents [C, height, width]."""
        path, row = self._places[index]
        return _tensor(path, f"{row}.latents")

    def thumbnail(self, index: int) -> Tensor:
        """The image in small, [height, width, 3] uint8."""
        path, row = self._places[index]
        return _tensor(path, f"{row}.thumbnail")

    def text(self, index: int, number: int) -> EncodedText:
        """Prompt `number` of an image."""
        path, row = self._places[index]
        return _text(path, row, self.descriptions[index], number)

    def empty_text(self) -> EncodedText:
        """The empty prompt."""
        return _text(self._empty.path, 0, self._empty.descriptions[0], 0)


@dataclass(frozen=True)
class _Shard:
    """What is known of a shard without reading its tensors."""

    path: Path
    descriptions: tuple[Description, ...]
    skipped: Counter[str]


def _read_shard(path: Path, identity: str) -> _Shard | None:
    """A shard if it is there, of this identity, and as long as it was; else a warning says why not."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:  # compares the length of the file with its header
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                logger.warning(
                    "%s was made from another model, other data or settings; it is built again", path
                )
                return None
            stored = file.get_tensor("descriptions").numpy().tobytes()
        if hashlib.sha256(stored).hexdigest() != metadata["descriptions"]:
            raise ValueError("other descriptions than were written")
        content = json.loads(stored)
    except (SafetensorError, ValueError, KeyError) as error:
        logger.warning("%r is damaged (%s); it is built again", str(path), error)
        return None
    descriptions = tuple(
        Description(entry["name"], tuple(entry["classes"]), tuple(entry["masks"]), tuple(entry["texts"]))
        for entry in content["examples"]
    )
    return _Shard(path, descriptions, Counter(content["skipped"]))


def _save_shard(
    path: Path,
    identity: str,
    descriptions: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    skipped: Mapping[str, int],
) -> None:
    stored = json.dumps({"examples": descriptions, "skipped": skipped}).encode()
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    whole["descriptions"] = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    whole[_SEAL] = torch.zeros(SEAL_BYTES, dtype=torch.uint8)
    metadata = {"identity": identity, "descriptions": hashlib.sha256(stored).hexdigest()}
    data = save(whole, metadata)
    if any(data[-SEAL_BYTES:]):
        raise RuntimeError(f"safetensors did not store {_SEAL!r} last")
    write_sealed(path, data[:-SEAL_BYTES])


@cache
def _verify(path: Path, changed: int) -> None:
    """Compare a shard with its hash, once for each process and time of the file's last change."""
    try:
        read_sealed(path)
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{error}; remove it and start again: this file alone is encoded again, and the run goes on"
        ) from None


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path, changed: int) -> Any:
    _verify(path, changed)
    return safe_open(path, "pt")


def _tensor(path: Path, name: str) -> Tensor:
    tensor: Tensor = _opened(path, path.stat().st_mtime_ns).get_tensor(name)
    return tensor.clone()  # the file's memory is not to outlive its handle


def _text(path: Path, row: int, description: Description, number: int) -> EncodedText:
    entry = description.texts[number]
    arguments = {
        name: _restored(_tensor(path, f"{row}.text.{number}.{name}"), shape)
        for name, shape in entry["shapes"].items()
    }
    classes = {name: tuple(columns) for name, columns in entry["classes"].items()}
    return EncodedText(entry["text"], tuple(entry["content"]), classes, arguments)


def encode(
    pipe: Pipeline, dataset: Dataset, data: DataSettings, folder: Path, *, progress: bool = True
) -> Encodings:
    """Open the cache in `folder`, after building whatever of it is missing, stale or cut off.

    Shards are written whole, one after the other: an interrupted build goes on where it stopped. A run that
    needs a cache which another run is building waits for it.

    Args:
        pipe: a pipeline with VAE and text encoders.
        dataset: images with masks and captions.
        data: resolution, geometry, kind of text, shard size, limit.
        folder: of the cache.
        progress: whether to show a bar.

    Raises:
        ValueError: not one image can be used (the message counts the reasons), or the resolution does not
            suit the model.
        OSError: the cache cannot be written; what is complete stays and is used the next time.
    """
    backbone = find_backbone(pipe)
    multiple, largest = backbone.pixel_multiple(pipe), backbone.largest_size(pipe)
    if data.resolution % multiple or data.resolution > largest:
        raise ValueError(
            f"data.resolution={data.resolution} does not suit this model: use a multiple of {multiple} "
            f"up to {largest}"
        )
    items = dataset.items[: data.limit or None]
    identity = cache_identity(pipe, dataset, data)
    shards = {
        folder / f"shard-{number:05d}.safetensors": items[first : first + data.shard]
        for number, first in enumerate(range(0, len(items), data.shard))
    }
    empty = folder / "empty-prompt.safetensors"
    with _one_builder(folder):
        found = {path: _read_shard(path, identity) for path in (empty, *shards)}
        encoder = _Encoder(pipe, data)
        try:
            if found[empty] is None:
                text, tensors = encoder.texts([{"text": "", "content": [], "classes": {}}])
                description = {"name": "", "classes": [], "masks": [], "texts": text}
                _save_shard(empty, identity, [description], {f"0.{n}": t for n, t in tensors.items()}, {})
            missing = {path: part for path, part in shards.items() if found[path] is None}
            with tqdm(
                total=sum(map(len, missing.values())),
                desc="encoding",
                unit="image",
                disable=None if progress else True,
            ) as bar:
                for path, part in missing.items():
                    _write_shard(path, identity, encoder, part, bar)
        except OSError as error:
            raise OSError(
                f"the cache in {str(folder)!r} cannot be written ({error}); free some space or set "
                "data.cache to another folder, and start again: what is complete is kept"
            ) from error
        for path in set(folder.glob("shard-*.safetensors")) - shards.keys():  # of a larger data set, once
            path.unlink(missing_ok=True)
    whole = {path: shard or _read_shard(path, identity) for path, shard in found.items()}
    complete = [shard for shard in whole.values() if shard is not None]
    if len(complete) < len(whole):
        raise DamagedFileError(f"the cache in {str(folder)!r} changed while it was built; start again")
    encodings = Encodings(complete[1:], complete[0])
    _report(encodings, len(items))
    return encodings


@contextmanager
def _one_builder(folder: Path) -> Iterator[None]:
    """Wait for another run that builds this cache, and let others wait."""
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that is read only may hold a complete cache
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder / ".lock", wait=True))
        yield


def cache_identity(pipe: Pipeline, dataset: Dataset, data: DataSettings) -> str:
    """Hash of everything that decides what a cache holds."""
    what = {
        "format": _FORMAT,
        "model": encoders_identity(pipe),
        "dataset": fingerprint(dataset),
        **{
            name: getattr(data, name) for name in ("kind", "resolution", "geometry", "text", "limit", "shard")
        },
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class _Encoder:
    """VAE and text encoders of a pipeline, one example at a time."""

    def __init__(self, pipe: Pipeline, data: DataSettings) -> None:
        self._pipe = pipe
        self._data = data
        self._backbone = find_backbone(pipe)
        self._span = self._backbone.name_span(pipe)

    @torch.no_grad()
    def __call__(self, example: Example) -> tuple[dict[str, Any], dict[str, Tensor], Counter[str]]:
        """Description, tensors, and what was left out of the texts.

        Raises:
            UnusableItemError: nothing to train on is left.
        """
        fitted = _fit(example, self._data)
        chosen, left_out = self._chosen_texts(fitted)
        if not chosen:
            raise UnusableItemError("no text to train on", example.name)
        texts, tensors = self.texts(chosen)
        pixels = torch.from_numpy(np.array(fitted.image)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        latents = self._backbone.latents(self._pipe, pixels)[0]
        side = min(_THUMBNAIL, fitted.image.width)
        small = fitted.image.resize((side, side))
        tensors |= {"latents": latents, "thumbnail": torch.from_numpy(np.array(small))}
        description = {
            "name": example.name,
            "classes": fitted.classes,
            "masks": [_run_lengths(mask) for mask in fitted.masks],
            "texts": texts,
        }
        return description, tensors, left_out

    @torch.no_grad()
    def texts(self, entries: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Entries with the shapes of their texts' transformer arguments, and those arguments, trimmed."""
        arguments = self._backbone.encode_text(self._pipe, [entry["text"] for entry in entries])
        texts, tensors = [], {}
        for number, entry in enumerate(entries):
            trimmed, shapes = _trimmed_arguments({name: tensor[number] for name, tensor in arguments.items()})
            texts.append({**entry, "shapes": shapes})
            tensors.update({f"text.{number}.{name}": tensor for name, tensor in trimmed.items()})
        return texts, tensors

    def _chosen_texts(self, example: Example) -> tuple[list[dict[str, Any]], Counter[str]]:
        left_out: Counter[str] = Counter()
        names = list(dict.fromkeys(name for name in example.classes if name))
        if self._data.text == "classes":
            if not names:
                raise UnusableItemError("no class names", example.name)
            try:
                prompts = plan_prompts(names, self._span)
            except ValueError as error:
                raise UnusableItemError("class names that no prompt holds", str(error)) from None
            first = prompts[0]
            kept = names[: len(first.columns)]
            left_out[CUT_OFF] += len(names) - len(kept)
            content = sorted(column for columns in first.columns for column in columns)
            entry = {
                "text": first.text,
                "content": content,
                "classes": dict(zip(kept, first.columns, strict=True)),
            }
            return [entry], +left_out
        texts = []
        for caption in example.captions:
            classes = {}
            for name in names:
                try:
                    classes[name] = find_words([self._span], {self._span.encoder: caption}, name)
                except ValueError:  # not a word of the caption, or one that was cut off
                    left_out[CUT_OFF] += name.casefold() in caption.casefold()
            content = self._span.columns(caption)
            texts.append({"text": caption, "content": content, "classes": classes})
        return texts, +left_out


def _fit(example: Example, data: DataSettings) -> Example:
    """The example on its square, masks at their own resolution."""
    width, height = example.image.size
    box = (0, 0, width, height)
    if data.geometry == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    size = (data.resolution, data.resolution)
    image = example.image.resize(size, Image.Resampling.BICUBIC, box=box)
    small = min(data.resolution, _MASK_SIDE)
    masks, classes = [], []
    for mask, name in zip(example.masks, example.classes, strict=True):
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        fitted = np.asarray(grey.resize((small, small), Image.Resampling.BOX, box=box)) > 127
        if fitted.any():
            masks.append(fitted)
            classes.append(name)
    if not masks:
        raise UnusableItemError("no mask on the square", example.name)
    return Example(example.name, image, tuple(masks), tuple(classes), example.captions)


def _write_shard(path: Path, identity: str, encoder: _Encoder, items: Sequence[Item], bar: Any) -> None:
    descriptions: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    skipped: Counter[str] = Counter()
    for item in items:
        try:
            description, of_example, left_out = encoder(read_example(item))
        except UnusableItemError as error:
            logger.debug("skipping %s: %s", item.name, error)
            skipped[error.reason] += 1
        else:
            tensors.update({f"{len(descriptions)}.{name}": tensor for name, tensor in of_example.items()})
            descriptions.append(description)
            skipped.update(left_out)
        bar.update()
    _save_shard(path, identity, descriptions, tensors, skipped)


def _report(encodings: Encodings, count: int) -> None:
    reasons = ", ".join(f"{number} x {reason}" for reason, number in encodings.skipped.most_common())
    if len(encodings) == 0:
        raise ValueError(f"none of the {count} images can be used: {reasons}")
    if reasons:
        logger.warning("%d of %d images are used; left out: %s", len(encodings), count, reasons)


def _trimmed_arguments(arguments: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Arguments without the zeros that end their axes (T5's place, CLIP's missing channels), and shapes."""
    trimmed, shapes = {}, {}
    for name, tensor in arguments.items():
        # Safetensors would store a mask of booleans behind the seal, which has to be last.
        tensor = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        nonzero = tensor != 0
        lengths = []
        for axis in range(tensor.dim()):
            others = tuple(a for a in range(tensor.dim()) if a != axis)
            used = nonzero.any(dim=others) if others else nonzero
            lengths.append(max(int(used.nonzero().max()) + 1 if bool(used.any()) else 0, 1))
        trimmed[name] = tensor[tuple(slice(0, length) for length in lengths)].clone()
        shapes[name] = list(tensor.shape)
    return trimmed, shapes


def _restored(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if list(tensor.shape) == list(shape):
        return tensor
    whole = tensor.new_zeros(tuple(shape))
    whole[tuple(slice(0, length) for length in tensor.shape)] = tensor
    return whole


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as rle

    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def _sized(mask: Mapping[str, Any]) -> tuple[Mapping[str, Any], int, int]:
    """Arguments of `decode_mask` for a mask of a cache."""
    height, width = mask["size"]
    if not (0 < height <= _MASK_SIDE and 0 < width <= _MASK_SIDE):
        raise ValueError(f"a mask of the cache is {width} x {height}, larger than {_MASK_SIDE}; delete it")
    return mask, height, width


def areas(masks: Sequence[Mapping[str, Any]]) -> list[float]:
    """Share of the image that each run-length mask covers."""
    runs = [run_lengths(*_sized(mask)) for mask in masks]
    return [float(lengths[1::2].sum() / lengths.sum()) for lengths in runs]


def decode_masks(masks: Sequence[Mapping[str, Any]]) -> Tensor:
    """uint8 [M, height, width] from run-length masks of one size."""
    return torch.from_numpy(np.stack([decode_mask(*_sized(mask)) for mask in masks]).astype(np.uint8))
