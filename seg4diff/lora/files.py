"""Adapters in and out: files that stock diffusers loads, and the authors' published ones.

It hides key layouts; nothing is
loaded from a file of which a single key does not fit the model.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from seg4diff.backbones import Pipeline, find_backbone, transformer_of
from seg4diff.files import write_atomically
from seg4diff.loading import is_out_of_memory, out_of_memory_remedy
from seg4diff.lora.adapters import ADAPTER

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for adapters in a folder."""

_LAYOUTS = {
    # "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", as diffusers and this library write it; its
    # training scripts add text encoders
    "diffusers": re.compile(
        r"(?P<component>transformer|text_encoder(_\d+)?)\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight"
    ),
    # "backbone.transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight", the authors' checkpoints
    "authors": re.compile(
        r"(model\.)?backbone\.(?P<component>transformer)\.(?P<module>.+)\.lora_(?P<part>[AB])\.default\.weight"
    ),
}
_LISTED = 12

Loaded = TypeVar("Loaded", bound=Pipeline)


def save_lora(
    transformer: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str = ADAPTER,
) -> Path:
    """Write an adapter so that ``pipe.load_lora_weights(path)`` of stock diffusers loads it.

    Args:
        transformer: has the adapter.
        path: a ``.safetensors`` file, or a folder, in which it is called as diffusers expects. A file that is
            there is replaced by a whole one or not at all.
        adapter: its name.

    Returns:
        The file.

    Raises:
        ValueError: there is no such adapter.
        OSError: the file cannot be written; what was there is untouched.
    """
    import diffusers
    from peft import get_peft_model_state_dict

    configurations: Any = getattr(transformer, "peft_config", {})
    if adapter not in configurations:
        raise ValueError(f"the transformer has no adapter {adapter!r}; it has {sorted(configurations)}")
    layers = get_peft_model_state_dict(transformer, adapter_name=adapter)
    layers = {name: tensor.detach().float().cpu().contiguous() for name, tensor in layers.items()}
    config = configurations[adapter]
    # The few settings that every version of peft knows, and those that every version of diffusers asks for.
    metadata = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME

    def write(temporary: Path) -> None:
        try:
            getattr(diffusers, find_backbone(transformer).pipeline).save_lora_weights(
                str(temporary.parent),
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=metadata,
                weight_name=temporary.name,
            )
        except SafetensorError as error:  # of a full disk, for example
            raise OSError(f"{str(file)!r} cannot be written ({error})") from error

    return write_atomically(file, write)


def load_lora(pipe: Loaded, path: str | os.PathLike[str], *, adapter: str | None = None) -> Loaded:
    """Load an adapter into a pipeline, if every key of the file fits its transformer or text encoders.

    Args:
        pipe: a diffusers pipeline, patched or not.
        path: a ``.safetensors`` file in diffusers' layout or a folder with one, or a ``.pth`` file of the
            authors. Pickles are read with ``weights_only=True``, so that nothing in them runs.
        adapter: the name it gets; diffusers chooses one when None.

    Returns:
        ``pipe`` itself, with the adapter switched on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or no adapter, or keys or shapes do not fit; the message lists them.
        TypeError: ``pipe`` is not a pipeline.
        MemoryError: the adapter does not fit.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise TypeError(f"{type(pipe).__name__} cannot load a LoRA; give its diffusers pipeline")
    file = _file(Path(path))
    state = _read(file)
    layout, parts = _parse(state, file)
    _check(parts, pipe, file)
    arguments: dict[str, Any] = {} if adapter is None else {"adapter_name": adapter}
    # It warns that a transformer's adapter has nothing for the text encoders.
    log = logging.getLogger("diffusers.loaders.lora_base")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        _hand_over(pipe, layout, file, parts, arguments)
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(out_of_memory_remedy(f"loading {str(file)!r}")) from error
        # Keys, shapes and numbers fit: what is left is damaged metadata, which diffusers does not check.
        raise ValueError(
            f"LoRA {str(file)!r} is refused by diffusers ({type(error).__name__}: {error}); "
            "get a whole copy of it"
        ) from error
    finally:
        log.setLevel(level)
    return pipe


def _hand_over(
    pipe: Pipeline,
    layout: str,
    file: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    arguments: dict[str, Any],
) -> None:
    """Let diffusers load what was found to fit."""
    if layout == "diffusers" and file.suffix == ".safetensors":  # with the alpha that its header may hold
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, **arguments)
    else:
        renamed = {
            f"{module}.lora_{part}.weight": tensor
            for module, both in parts.items()
            for part, tensor in both.items()
        }
        pipe.load_lora_weights(renamed, **arguments)


def _file(path: Path) -> Path:
    if path.is_dir():
        found = [path / FILE_NAME] if (path / FILE_NAME).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"LoRA folder {str(path)!r} holds {len(found)} safetensors files and no {FILE_NAME}; "
                "name the file"
            )
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(f"LoRA {str(path)!r} does not exist; check the path")
    return path


def _read(file: Path) -> dict[str, Tensor]:
    data = file.read_bytes()
    content: Any
    try:
        if file.suffix == ".safetensors":
            content = load(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"LoRA {str(file)!r} is damaged ({error}); get a whole copy of it") from None
    except Exception as error:  # PyTorch raises errors of a dozen types here
        if is_out_of_memory(error):
            raise MemoryError(out_of_memory_remedy(f"loading {str(file)!r}")) from error
        # What PyTorch says is advice to run whatever the file holds.
        raise ValueError(
            f"LoRA {str(file)!r} is damaged, or holds more than weights, and reading that would run it; "
            "get a whole copy, or one in safetensors"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in content.items()
    ):
        raise ValueError(f"LoRA {str(file)!r} holds no table of weights; a file of LoRA weights is expected")
    return content


def _parse(state: Mapping[str, Tensor], file: Path) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The layout, and the matrices A and B of every module, by its path within the pipeline."""
    if not state:
        raise ValueError(f"LoRA {str(file)!r} is empty")
    fits = {
        name: {key: found for key in state if (found := layout.fullmatch(key))}
        for name, layout in _LAYOUTS.items()
    }
    layout = max(fits, key=lambda name: len(fits[name]))
    strange = [key for key in state if key not in fits[layout]]
    if strange:
        raise ValueError(
            f"LoRA {str(file)!r} is refused: {len(strange)} of {len(state)} keys are no LoRA of it: "
            + _listed(strange)
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, found in fits[layout].items():
        module = f"{found['component']}.{found['module']}"
        parts.setdefault(module, {})[found["part"]] = state[key]
    return layout, parts


def _check(parts: Mapping[str, Mapping[str, Tensor]], pipe: Pipeline, file: Path) -> None:
    modules = _modules(pipe)
    problems = []
    for name, both in parts.items():
        module: Any = modules.get(name)
        if module is None or not hasattr(module, "in_features"):
            problems.append(f"{name} (no such layer)")
        elif both.keys() != {"A", "B"}:
            problems.append(f"{name} (lora_{'B' if 'A' in both else 'A'} is missing)")
        elif not all(t.is_floating_point() and t.isfinite().all() for t in both.values()):
            problems.append(f"{name} (values that are not finite numbers)")
        else:
            rank = both["A"].shape[0] if both["A"].dim() == 2 else 0
            expected = [rank, module.in_features], [module.out_features, rank]
            shapes = list(both["A"].shape), list(both["B"].shape)
            if rank == 0 or shapes != expected:
                problems.append(
                    f"{name} (A {shapes[0]}, B {shapes[1]}; the layer is {module.in_features} -> "
                    f"{module.out_features})"
                )
    if problems:
        raise ValueError(
            f"LoRA {str(file)!r} is refused: {len(problems)} of {len(parts)} layers do not fit this "
            f"{type(pipe).__name__}: {_listed(problems)}"
        )


def _modules(pipe: Pipeline) -> dict[str, nn.Module]:
    """Modules by their path within the pipeline."""
    modules = {f"transformer.{name}": module for name, module in transformer_of(pipe).named_modules()}
    for component in (name for name in pipe.components if name.startswith("text_encoder")):
        encoder = getattr(pipe, component)
        for name, module in () if encoder is None else encoder.named_modules():
            modules[f"{component}.{name}"] = module
            # Some versions of transformers have this level, some do not; diffusers takes files of both kinds.
            modules[f"{component}.text_model.{name}"] = module
    return modules


def _listed(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, and {len(names) - _LISTED} more"
