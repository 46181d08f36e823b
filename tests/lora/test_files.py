"""Adapters in and out: stock diffusers, the authors' layout, and files that are refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import seg4diff
from seg4diff.lora.adapters import ADAPTER, add_adapters
from seg4diff.lora.files import FILE_NAME, load_lora, save_lora
from seg4diff.lora.settings import LoraSettings
from tests.support import tiny


def tuned(**lora: Any) -> Any:
    """A tiny pipeline with adapters that change what it does."""
    pipe = tiny.pipeline()
    weights = add_adapters(pipe.transformer, LoraSettings(**{"rank": 4, **lora}))
    generator = torch.Generator().manual_seed(2)
    for weight in weights:
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return pipe


@torch.no_grad()
def output(pipe: Any) -> torch.Tensor:
    found: torch.Tensor = pipe.transformer(**tiny.transformer_inputs(), return_dict=False)[0]
    return found


def authors(pipe: Any, nested: bool = True) -> dict[str, Any]:
    """Adapters as the published checkpoints hold them."""
    state = {
        f"backbone.transformer.{name.replace(f'.{ADAPTER}.', '.default.')}": tensor
        for name, tensor in pipe.transformer.state_dict().items()
        if f".{ADAPTER}." in name
    }
    return {"model": state} if nested else {f"model.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("alpha", [0.0, 8.0, 3.0])
def test_stock_diffusers_loads_what_was_saved(alpha: float, tmp_path: Path) -> None:
    pipe = tuned(alpha=alpha)
    file = save_lora(pipe.transformer, tmp_path)
    assert file == tmp_path / FILE_NAME
    fresh = tiny.pipeline()
    untouched = output(fresh)
    fresh.load_lora_weights(str(tmp_path), weight_name=FILE_NAME)
    torch.testing.assert_close(output(fresh), output(pipe), rtol=0, atol=0)
    assert not torch.allclose(output(fresh), untouched)
    torch.testing.assert_close(output(load_lora(tiny.pipeline(), file)), output(pipe), rtol=0, atol=0)


def test_patched_pipelines_keep_their_patch(tmp_path: Path) -> None:
    save_lora(tuned().transformer, tmp_path / "a.safetensors")
    pipe = seg4diff.patch(tiny.pipeline())
    assert load_lora(pipe, tmp_path / "a.safetensors", adapter="mine") is pipe
    assert seg4diff.is_patched(pipe)
    assert list(pipe.transformer.peft_config) == ["mine"]
    with seg4diff.capture(pipe.transformer, layers=[1]) as captured:
        output(pipe)
    assert len(captured.records) == 1


@pytest.mark.parametrize("nested", [True, False])
def test_authors_layout(nested: bool, tmp_path: Path) -> None:
    pipe = tuned()
    torch.save(authors(pipe, nested), tmp_path / "model_final.pth")
    loaded = load_lora(tiny.pipeline(), tmp_path / "model_final.pth")
    torch.testing.assert_close(output(loaded), output(pipe), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_pickles_run_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(ValueError, match="holds more than weights"):
        load_lora(tiny.pipeline(), path)
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="holds more than weights"):
        load_lora(tiny.pipeline(), path)
    assert not (tmp_path / "ran").exists()
    path.write_text("no pickle at all")
    with pytest.raises(ValueError, match="is damaged") as caught:
        load_lora(tiny.pipeline(), path)
    assert "weights_only" not in str(caught.value)  # PyTorch advises to switch it off


def test_text_encoders_of_a_training_script(tmp_path: Path) -> None:
    pipe = tuned()
    state = load_file(save_lora(pipe.transformer, tmp_path))
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    width = tiny.pipeline().text_encoder.config.hidden_size
    state[f"text_encoder.{layer}.lora_A.weight"] = torch.ones(2, width)
    state[f"text_encoder.{layer}.lora_B.weight"] = torch.ones(width, 2)
    save_file(state, tmp_path / "both.safetensors")
    loaded = load_lora(tiny.pipeline(), tmp_path / "both.safetensors")
    assert any(".lora_A." in name for name, _ in loaded.text_encoder.named_parameters())
    torch.testing.assert_close(output(loaded), output(pipe), rtol=0, atol=0)
    state[f"text_encoder_2.{layer.replace('.0.', '.99.')}.lora_A.weight"] = torch.ones(2, width)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"1 of 14 layers.*text_encoder_2.*layers.99.*no such layer"):
        load_lora(tiny.pipeline(), tmp_path / "wrong.safetensors")


def test_only_pipelines_take_a_lora(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="SD3Transformer2DModel cannot load a LoRA; give"):
        load_lora(tiny.pipeline().transformer, tmp_path)


def test_files_whose_keys_do_not_all_match_are_refused_with_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    whole = authors(tuned())["model"]
    first = "backbone.transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight"

    def refused(state: dict[str, Any], message: str) -> None:
        torch.save({"model": state}, path)
        pipe = tiny.pipeline()
        with pytest.raises(ValueError, match=message):
            load_lora(pipe, path)
        assert not hasattr(pipe.transformer, "peft_config")  # nothing was loaded

    refused({**whole, "criterion.weight": torch.ones(1)}, "1 of 25 keys are no LoRA.*: criterion.weight")
    refused(
        {k: v for k, v in whole.items() if k != first},
        r"1 of 12 layers.*blocks.0.attn.to_q \(lora_A is missing\)",
    )
    refused({**whole, first: torch.ones(4, 5)}, r"to_q \(A \[4, 5\], B \[16, 4\]; the layer is 16 -> 16\)")
    renamed = {k.replace("blocks.2.", "blocks.7."): v for k, v in whole.items()}
    refused(renamed, r"4 of 12 layers do not fit.*blocks.7.attn.to_k \(no such layer\)")
    many = {f"strange.{number}": torch.ones(1) for number in range(20)}
    refused({**whole, **many}, "20 of 44 keys.*and 8 more")
    refused({}, "is empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is damaged"), (b"\x10\0\0\0\0\0\0\0{", "is damaged"), (b"nonsense" * 9, "is damaged")],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    path = (tmp_path / "a").with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_lora(tiny.pipeline(), path)


def test_missing_and_ambiguous_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_lora(tiny.pipeline(), tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="holds 0 safetensors files"):
        load_lora(tiny.pipeline(), tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="holds 2 safetensors files"):
        load_lora(tiny.pipeline(), tmp_path)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no table of weights"):
        load_lora(tiny.pipeline(), tmp_path / "list.pth")


def test_saving_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tuned()
    file = save_lora(pipe.transformer, tmp_path)
    before = load_file(file)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_lora(pipe.transformer, tmp_path)
    assert {name: tensor.sum() for name, tensor in load_file(file).items()} == {
        n: t.sum() for n, t in before.items()
    }
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_lora(pipe.transformer, tmp_path, adapter="other")


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """safetensors has its own type for it, which no caller expects."""
    import resource

    pipe = tuned()
    file = save_lora(pipe.transformer, tmp_path)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{FILE_NAME}' cannot be written"):
            save_lora(pipe.transformer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.filterwarnings("default")  # peft warns of names that do not fit each other, and goes on
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_altered_files_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    """Or loaded, where the altered bits are weights: neither format has a hash."""
    pipe = tuned()
    path = (tmp_path / "a").with_suffix(suffix)
    if suffix == ".pth":
        torch.save(authors(pipe), path)
    else:
        save_lora(pipe.transformer, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if suffix == ".safetensors" else len(whole)
    refused = 0
    pipe = tiny.pipeline()
    for number in range(20):
        altered = bytearray(whole)
        altered[header * number // 20] ^= 1 << number % 8
        path.write_bytes(altered)
        try:
            load_lora(pipe, path)
        except ValueError as error:
            message = str(error)
        else:
            pipe = tiny.pipeline()
            continue
        refused += 1
        assert f"{path.name}'" in message
        assert not any(".lora_" in name for name, _ in pipe.transformer.named_parameters())
    assert refused > 0


@pytest.mark.parametrize("metadata", ["{", "[]", "3", '{"transformer.r": {}}'])
def test_damaged_metadata(metadata: str, tmp_path: Path) -> None:
    state = load_file(save_lora(tuned().transformer, tmp_path))
    path = tmp_path / "a.safetensors"
    save_file(state, path, metadata={"format": "pt", "lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match="a.safetensors' is refused by diffusers"):
        load_lora(tiny.pipeline(), path)


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    state = load_file(save_lora(tuned().transformer, tmp_path))
    key = next(iter(state))
    changes: dict[str, tuple[torch.Tensor, str]] = {
        "nan": (state[key] * float("nan"), "not finite numbers"),
        "integers": (state[key].to(torch.int32), "not finite numbers"),
        "rank 0": (state[key][:0], "no such layer|A "),
    }
    for value, message in changes.values():
        save_file({**state, key: value}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=message):
            load_lora(tiny.pipeline(), tmp_path / "a.safetensors")
    torch.save({0: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no table of weights"):
        load_lora(tiny.pipeline(), tmp_path / "a.pth")
