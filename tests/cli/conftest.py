"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that --model stands for, whatever it says; its expert layer is 1."""
    from seg4diff import loading

    pipe = tiny.pipeline()
    pipe.transformer.register_to_config(_seg4diff_expert_layers=[1])
    monkeypatch.setattr(loading, "load_pipeline", lambda *_, **__: pipe)
    return pipe


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved pipeline."""
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes something: its second factor is not zero."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("lora")
    transformer = tiny.pipeline().transformer
    transformer.add_adapter(
        LoraConfig(r=2, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False)
    )
    StableDiffusion3Pipeline.save_lora_weights(folder, get_peft_model_state_dict(transformer))
    return folder
