"""Captions for images that have none, from any image-to-text model of transformers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from seg4diff.data.annotations import read_json
from seg4diff.data.items import Item, UnusableItemError
from seg4diff.data.registry import open_dataset
from seg4diff.files import write_atomically
from seg4diff.jobs import claim, results_in
from seg4diff.loading import choose_device, default_dtype

logger = logging.getLogger(__name__)

PROMPT = "Describe this image in one sentence."


def write_captions(
    images: str | os.PathLike[str],
    model: str,
    out: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    batch_size: int = 8,
    max_tokens: int = 70,
    device: str | None = None,
    progress: bool = True,
) -> Path:
    """Write a JSON object of image name -> caption for every image in a folder.

    Images that the file names already keep their captions, also those written by hand. Until all are done,
    captions are kept in the folder `OUT.part`, from which the same call goes on after an interruption.
    Unreadable images are left out and counted in a message.

    Args:
        images: a folder; images in folders inside it are named by their path.
        model: a name on the Hugging Face hub, or a folder.
        out: the JSON file.
        prompt: what to ask; models that chat get `PROMPT` when None, others nothing.
        batch_size: images that run together.
        max_tokens: longest caption; CLIP reads 75 tokens.
        device: the GPU if there is one (CUDA, ROCm or MPS) when None.
        progress: whether to show a bar.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no image.
        ValueError: `out` holds something else, the device is absent, the model is of another kind, or an
            interrupted run had another model or prompt.
        FolderInUseError: another run writes the same file.
    """
    out = Path(out)
    if batch_size < 1 or max_tokens < 1:
        raise ValueError(f"batch_size={batch_size!r} and max_tokens={max_tokens!r} must be at least 1")
    items = open_dataset("images", Path(images)).items
    captions = _existing(out)
    wanted = {item.name: item for item in items if item.name not in captions}
    if not wanted:
        return out
    names = list(wanted)
    batches = [names[first : first + batch_size] for first in range(0, len(names), batch_size)]
    identity = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "batch_size": batch_size}
    with claim(out.with_name(f"{out.name}.part"), identity) as job:
        pending = job.pending(batches, {entry["name"] for entry in results_in(job.folder)})
        speak = Captioner(model, prompt, max_tokens, device) if pending else None
        for batch in tqdm(pending, desc="captions", unit="batch", disable=None if progress else True):
            readable = _readable([wanted[name] for name in batch])
            if readable and speak is not None:
                texts = speak(list(readable.values()))
                job.append({"name": n, "caption": text} for n, text in zip(readable, texts, strict=True))
        found = {entry["name"]: entry["caption"] for entry in results_in(job.folder)}
        text = json.dumps({**captions, **found, **captions}, indent=1, ensure_ascii=False)
        write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
        job.remove()
    unreadable = len(wanted.keys() - found.keys())
    if unreadable:
        logger.warning("%d of %d images could not be read and have no caption", unreadable, len(items))
    return out


def _readable(items: Sequence[Item]) -> dict[str, Image.Image]:
    images: dict[str, Image.Image] = {}
    for item in items:
        try:
            images[item.name] = item.image()
        except UnusableItemError as error:
            logger.warning("%s", error)
    return images


class Captioner:
    """An image-to-text model of transformers and its processor; the arguments are those of `write_captions`.

    Raises:
        ValueError: the model cannot be loaded as an image-to-text model.
    """

    def __init__(
        self, model: str, prompt: str | None = None, max_tokens: int = 70, device: str | None = None
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        place = choose_device(device)
        dtype = default_dtype(place)
        try:
            self._processor: Any = AutoProcessor.from_pretrained(model)
            self._model: Any = (
                AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(place).eval()
            )
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"model {model!r} cannot be loaded as an image-to-text model of transformers ({error}); "
                "Salesforce/blip-image-captioning-base is a small one"
            ) from error
        self._max_tokens = max_tokens
        self._chats = getattr(self._processor, "chat_template", None) is not None
        self._prompt = PROMPT if prompt is None and self._chats else prompt

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption for each image, on one line."""
        arguments: dict[str, Any] = {"images": list(images)}
        if self._chats:
            content = [{"type": "image"}, {"type": "text", "text": self._prompt}]
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            arguments.update(images=[[image] for image in images], text=[text] * len(images), padding=True)
        elif self._prompt:
            arguments.update(text=[self._prompt] * len(images), padding=True)
        inputs = self._processor(**arguments, return_tensors="pt").to(self._model.device)
        for name, tensor in inputs.items():
            if tensor.is_floating_point():
                inputs[name] = tensor.to(self._model.dtype)
        tokens = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        if self._chats and not self._model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # without the question
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def _existing(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {}
    try:
        captions = read_json(out)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{str(out)!r} exists and does not hold captions ({error}); choose another file"
        ) from None
    if "annotations" in captions:
        raise ValueError(f"{str(out)!r} exists and does not hold captions by image; choose another file")
    return captions
