"""A pipeline from a name: the bundled model, a local folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from seg4diff.backbones import Backbone, Pipeline, families

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "stabilityai/stable-diffusion-3-medium-diffusers"
"""Stable Diffusion 3 medium on the Hugging Face hub; its licence has to be accepted there once."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions that a model can be loaded in, by name."""

_SMALLER = (
    "lower --batch-size, use --dtype bfloat16, or --offload, which keeps on the GPU only the part that is "
    "running (in Python: batch_size=, dtype=, pipe.enable_model_cpu_offload()); smaller images do not "
    "help, they are brought to the size of the model"
)


def load_pipeline(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    t5: bool = False,
    offload: bool = False,
) -> Pipeline:
    """A diffusers pipeline, ready to be patched.

    Args:
        model: ``"demo"`` for the bundled model, a local folder in diffusers' format, or the name of a
            repository on the Hugging Face hub.
        device: where to put it; by default the GPU if there is one (CUDA, ROCm or MPS), else the CPU.
        dtype: a precision, or its name in ``DTYPES``; bfloat16 on a GPU and float32 elsewhere by default.
        t5: load T5 where the model works without it, as Stable Diffusion 3 does. Segmentation does not use
            it there, as in the paper; it is the largest part of that model.
        offload: keep the parts on the CPU and move each to ``device`` while it runs.

    Raises:
        ValueError: the device is absent, the precision unknown, a file damaged, or the model of another
            family or library.
        FileNotFoundError: no such folder, or a file is missing in it.
        PermissionError: the hub wants a login or an accepted licence.
        ConnectionError: the hub cannot be reached.
        MemoryError: the model does not fit; the message says what would help.
    """
    place = choose_device(device)
    if offload and place.type == "cpu":
        raise ValueError("offload=True needs a GPU to run on, but the device is cpu; leave it out")
    precision = _precision(dtype, place)
    try:
        if str(model) == "demo":
            from seg4diff.demo import WEIGHTS

            with _quiet():
                pipe = _from_folder(WEIGHTS, precision, t5)
        elif os.path.isdir(model):
            pipe = _from_folder(Path(model), precision, t5)
        else:
            pipe = _from_hub(os.fspath(model), precision, t5)
        if offload:
            pipe.enable_model_cpu_offload(device=place)
        elif place != pipe.device:  # diffusers warns of float16 on a CPU, also of a move to where it is
            pipe.to(place)
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(out_of_memory_remedy(f"loading {os.fspath(model)!r}")) from error
        raise
    return pipe


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors by which torch and Python say that memory, of any device, is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory_remedy(action: str) -> str:
    """What to tell someone who ran out of memory while doing ``action``."""
    return f"out of memory while {action}; {_SMALLER}"


def default_device() -> torch.device:
    """The GPU if there is one: CUDA (which is ROCm's name too), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and float32 on a CPU, and on MPS before macOS 14, which lacks bfloat16."""
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or `default_device()`.

    Raises:
        ValueError: it is unknown or absent; the message names what there is.
    """
    if device is None:
        return default_device()
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is unknown; use cpu, cuda, cuda:1, mps, ...") from None
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError(
                f"device={str(device)!r}: no CUDA device is available to torch {torch.__version__}; "
                "use device cpu, or install a GPU driver and a build of torch with CUDA"
            )
        if place.index is not None and place.index >= count:
            raise ValueError(f"device={str(device)!r}: the last of {count} CUDA devices is cuda:{count - 1}")
    elif place.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={str(device)!r}: no MPS device is available; use device cpu")
    return place


def _precision(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return default_dtype(device)
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(DTYPES)}")
    assert found is not None
    return found


def _from_folder(folder: Path, dtype: torch.dtype, t5: bool) -> DiffusionPipeline:
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise FileNotFoundError(
            f"model folder {str(folder)!r} has no model_index.json; give the folder of a whole pipeline in "
            "diffusers' format (pipe.save_pretrained(folder) writes one)"
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(index_file)!r} is damaged ({error}); get a whole copy of the model"
        ) from error
    skipped = _left_out(_check_index(index, str(folder)), index, t5)
    parts = [
        folder / part
        for part, entry in index.items()
        if isinstance(entry, list) and entry and entry[0] is not None and part not in skipped
    ]
    # Some parts would load without, with other settings than they were made with.
    lacking = [part.name for part in parts if not any(part.glob("*config.json"))]
    if lacking:
        raise FileNotFoundError(
            f"model folder {str(folder)!r} is incomplete, config.json and more are missing in: "
            f"{', '.join(lacking)}; get a whole copy of the model"
        )
    try:
        return _from_pretrained(str(folder), index, dtype, skipped)
    except Exception as error:  # libraries raise many kinds, most of which do not name the file
        if is_out_of_memory(error):
            raise
        reason = next(filter(None, map(_damage, parts)), f"{type(error).__name__}: {error}")
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"model folder {str(folder)!r} cannot be loaded ({reason}); get a whole copy of the model"
        ) from error


def _damage(part: Path) -> str | None:
    """The first damaged file in the folder of a part, and what is wrong with it."""
    for path in sorted(part.iterdir()):
        try:
            if path.suffix == ".safetensors":
                safe_open(path, "pt")
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
        except (ValueError, OSError, SafetensorError) as error:
            return f"{part.name}/{path.name} is damaged: {error}"
    return None


def _from_hub(name: str, dtype: torch.dtype, t5: bool) -> DiffusionPipeline:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if (
        name.startswith((".", "~", os.sep))
        or name.count("/") != 1
        or name.endswith((".safetensors", ".ckpt"))
    ):
        raise FileNotFoundError(
            f"model {name!r} is neither 'demo', nor a folder that exists, nor a name on the hub such as "
            f"{DEFAULT_MODEL!r}"
        )
    unreachable = (
        f"model {name!r} is not a local folder, and the hub cannot be reached for it; check the connection, "
        f"download it elsewhere with `hf download {name}` and give the folder, or try the bundled model, "
        "--model demo"
    )
    try:
        with open(hf_hub_download(name, "model_index.json"), encoding="utf-8") as file:
            index = json.load(file)
        backbone = _check_index(index, name)
        return _from_pretrained(name, index, dtype, _left_out(backbone, index, t5))
    except GatedRepoError as error:
        raise PermissionError(
            f"model {name!r} wants its licence accepted: do so on its page on the hub, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"model {name!r} is neither a local folder nor on the hub (or it is private: `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(unreachable) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"model {name!r} is not in diffusers' format: it has no model_index.json"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"model {name!r} is not a name on the hub ({error})") from error
    except (ConnectionError, TimeoutError) as error:
        raise ConnectionError(unreachable) from error


def _from_pretrained(
    name: str, index: dict[str, Any], dtype: torch.dtype, skipped: tuple[str, ...]
) -> DiffusionPipeline:
    import diffusers

    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise ValueError(f"model {name!r} is a {index.get('_class_name')}, which diffusers does not know")
    pipeline_class: Any = kind
    logger.info("loading %s as %s", name, dtype)
    return pipeline_class.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, use_safetensors=True, **dict.fromkeys(skipped)
    )


def _check_index(index: Any, name: str) -> Backbone:
    """The family of a pipeline, if every part of it is a class of diffusers or transformers: a model may name
    any module, its own included, and importing a module runs it."""
    parts = index if isinstance(index, dict) else {}
    transformer = parts.get("transformer")
    found = [b for b in families() if isinstance(transformer, list) and transformer[-1:] == [b.transformer]]
    if not found:
        supported = ", ".join(backbone.name for backbone in families())
        raise ValueError(f"model {name!r} is a {parts.get('_class_name')}; supported: {supported}")
    for part, entry in index.items():
        foreign = set(_libraries(entry)) - {None, "diffusers", "transformers"}
        if foreign and not part.startswith("_"):
            raise ValueError(
                f"model {name!r} is not loaded, since it could run its own code: model_index.json has "
                f"{part!r} as {json.dumps(entry)}, but only classes of diffusers and transformers are taken; "
                "correct the entry, or get the model from another source"
            )
    return found[0]


def _libraries(entry: Any) -> Iterator[Any]:
    """The first item of every ``[library, class]``, also in nested lists and objects."""
    if isinstance(entry, list) and entry and not isinstance(entry[0], (list, dict)):
        yield entry[0]
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from _libraries(inner)


def _left_out(backbone: Backbone, index: dict[str, Any], t5: bool) -> tuple[str, ...]:
    """The parts to pass as None: what the family works without, where it is not wanted, and where the model
    was saved without it, since diffusers reloads such a model only when told so."""
    return tuple(part for part in backbone.optional if part in index and (not t5 or index[part][0] is None))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars while small files are read, and no word on optional packages that are missing."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    verbosity = transformers_logging.get_verbosity()
    for log in shown:
        log.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for log in shown:
            log.enable_progress_bar()
