"""Every transformer class of the installed diffusers is supported, or refused by name with a reason."""

from __future__ import annotations

import inspect

import diffusers.models.transformers
import pytest
from torch import nn

import seg4diff
from seg4diff.backbones import families
from seg4diff.backbones.refused import REFUSED


def exported() -> set[str]:
    """Names of the transformer classes that diffusers exports."""
    found = inspect.getmembers(diffusers.models.transformers, inspect.isclass)
    return {name for name, cls in found if issubclass(cls, nn.Module)}


def test_every_transformer_is_supported_or_refused() -> None:
    """A new class in diffusers fails here until it gets a backbone, or a reason in `refused.py`."""
    assert len(exported()) > 70  # the search finds them
    supported = {backbone.transformer for backbone in families()}
    assert exported() - supported - set(REFUSED) == set()


def test_nothing_is_both_supported_and_refused() -> None:
    assert {backbone.transformer for backbone in families()} & set(REFUSED) == set()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusal_names_class_reason_and_what_is_supported(name: str) -> None:
    cls = type(name, (nn.Module,), {})
    subclass = type("Own", (cls,), {})
    for transformer in (cls(), subclass()):
        with pytest.raises(NotImplementedError) as caught:
            seg4diff.patch(transformer)
        message = str(caught.value)
        assert message.startswith(
            f"{type(transformer).__name__} is not supported: {REFUSED[name]}; supported: "
        )
        assert all(backbone.transformer in message for backbone in families())


def test_refusal_of_a_real_class() -> None:
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8
    )
    with pytest.raises(NotImplementedError, match=r"WanTransformer3DModel is not supported: .*video.*later"):
        seg4diff.capture(transformer).__enter__()
