"""Safetensors files that say whether they are whole: a checksum of the tensors stands in the header.

Called by the cache of encodings and by checkpoints. Files appear whole or not at all, and a file that was
cut off or changed later is told from a good one.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from seg4diff.saving import write_atomically

_CHECKSUM = "checksum"


class DamagedFileError(ValueError):
    """A file is truncated, altered, or not of this kind."""


def write_verified(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors and metadata in one step; a file at ``path`` is replaced only by a whole one.

    Raises:
        OSError: it cannot be written (a full disk, say); what was at ``path`` is untouched.
    """
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    digest = hashlib.sha256(_tensor_bytes(save(whole))).hexdigest()
    data = save(whole, metadata={**metadata, _CHECKSUM: digest})
    return write_atomically(path, lambda temporary: temporary.write_bytes(data))


def read_verified(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that :func:`write_verified` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is truncated, altered or not of this kind.
    """
    data = path.read_bytes()
    metadata = _checked_metadata(data, path)
    try:
        return load(data), metadata
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedFileError(f"{str(path)!r} is damaged ({error})") from None


def verify(path: Path) -> dict[str, str]:
    """Metadata of a file after its checksum was compared; errors as :func:`read_verified`."""
    return _checked_metadata(path.read_bytes(), path)


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata from the header alone, unverified; errors as :func:`read_verified`."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return _parse_header(file.read(min(length, 100_000_000)), path)


def _checked_metadata(data: bytes, path: Path) -> dict[str, str]:
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    metadata = _parse_header(data[8 : 8 + length], path)
    if hashlib.sha256(_tensor_bytes(data)).hexdigest() != metadata.get(_CHECKSUM):
        raise DamagedFileError(f"{str(path)!r} is truncated or was altered: its checksum does not fit")
    return metadata


def _parse_header(header: bytes, path: Path) -> dict[str, str]:
    try:
        parsed: Any = json.loads(header)
        metadata = parsed["__metadata__"]
    except (ValueError, KeyError, TypeError):
        raise DamagedFileError(f"{str(path)!r} is truncated, or no file of this library") from None
    return dict(metadata)


def _tensor_bytes(data: bytes) -> memoryview:
    """What follows the header: 8 bytes of length, then that many of JSON."""
    length = struct.unpack("<Q", data[:8])[0]
    return memoryview(data)[8 + length :]
