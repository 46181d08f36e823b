"""Low-rank adapters on a transformer: which modules get one, and how they start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seg4diff.backbones import find_backbone
from seg4diff.lora.settings import LoraSettings

ADAPTER = "magnet"
"""Name of the adapter within a transformer while it trains."""


def adapted_modules(
    transformer: nn.Module, lora: LoraSettings, *, stop_after: int | None = None
) -> list[str]:
    """Full names of the modules that get an adapter, in the order of the model.

    Args:
        transformer: of a supported family.
        lora: blocks and targets.
        stop_after: the last layer that runs, if the forward stops early: what it leaves out gets no adapter.

    Raises:
        ValueError: a block out of range, a target that no block has, or nothing is left.
    """
    backbone = find_backbone(transformer)
    blocks = backbone.blocks(transformer)
    for block in lora.blocks:
        if not 0 <= block < len(blocks):
            raise ValueError(f"lora.blocks names block {block}; this model has blocks 0 to {len(blocks) - 1}")
    path = {id(module): name for name, module in transformer.named_modules()}
    targets = lora.targets or backbone.lora_targets
    names, unknown = [], set(targets)
    for index, entry in enumerate(backbone.block_lists(transformer)):
        attention = blocks[index].get_submodule(entry.attention)
        # In a forward that stops at a layer, what its map does not depend on gets no gradient there.
        unneeded = {name.removeprefix(f"{entry.attention}.") for name in entry.unneeded + entry.values}
        inside = {name for name, module in attention.named_modules() if isinstance(module, nn.Linear)}
        unknown -= inside
        if lora.blocks and index not in lora.blocks:
            continue
        if stop_after is not None and index > stop_after:
            continue
        for target in targets:
            if target in inside and not (index == stop_after and target in unneeded):
                names.append(f"{path[id(attention)]}.{target}")
    if unknown:
        first = backbone.attention(transformer, 0)
        known = [name for name, module in first.named_modules() if isinstance(module, nn.Linear)]
        raise ValueError(f"lora.targets {sorted(unknown)} are in no block; a block has {', '.join(known)}")
    if not names:
        raise ValueError(
            f"lora.blocks={list(lora.blocks)} leaves no module to adapt before layer {stop_after}"
        )
    return names


def add_adapters(
    transformer: nn.Module,
    lora: LoraSettings,
    *,
    seed: int = 0,
    stop_after: int | None = None,
    adapter: str = ADAPTER,
) -> list[nn.Parameter]:
    """Freeze ``transformer`` and give it adapters in float32 that change nothing yet.

    A is normal with deviation 1 / rank, as peft's "gaussian", and B zero; drawn from ``seed`` alone.

    Returns:
        The parameters to train, in the order of the model.

    Raises:
        ValueError: see :func:`adapted_modules`; or the transformer has an adapter of that name already.
    """
    from peft import LoraConfig

    if adapter in getattr(transformer, "peft_config", {}):
        raise ValueError(
            f"the transformer has an adapter {adapter!r} already; unload it or train a fresh pipeline"
        )
    names = adapted_modules(transformer, lora, stop_after=stop_after)
    transformer.requires_grad_(False)
    alpha = lora.alpha or float(lora.rank)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # pyright: ignore[reportArgumentType]
        init_lora_weights="gaussian",
        target_modules=names,
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = transformer  # of diffusers
        model.add_adapter(config, adapter_name=adapter)
    # Drawn again: what peft draws depends on its version and on the dtype of the frozen weights.
    generator = torch.Generator().manual_seed(seed)
    trained = []
    for name, weight in transformer.named_parameters():
        if f".{adapter}." not in name:
            continue
        weight.data = weight.data.float()
        if ".lora_A." in name:
            drawn = torch.randn(weight.shape, generator=generator, device="cpu")
            weight.data.copy_(drawn / lora.rank)
        weight.requires_grad_(True)
        trained.append(weight)
    return trained
