"""A pipeline from a folder or a name, or an error that says what to do."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch

from seg4diff import loading
from seg4diff.loading import is_out_of_memory, load_pipeline, out_of_memory_remedy
from tests.support import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny pipeline without T5, as ``save_pretrained`` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.pipeline(layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_folder_without_t5(saved):
    original = tiny.pipeline(layers=2).transformer.state_dict()
    pipe = load_pipeline(saved)
    assert pipe.text_encoder_3 is None
    assert pipe.device.type == "cpu" or torch.cuda.is_available()
    loaded = load_pipeline(str(saved), "cpu", "float32").transformer.state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name]) for name in original)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_precision(saved, dtype):
    pipe = load_pipeline(saved, "cpu", dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {expected}


def test_t5_is_left_out_unless_asked_for(tmp_path):
    tiny.pipeline(t5=True, layers=1).save_pretrained(tmp_path / "with")
    assert load_pipeline(tmp_path / "with", "cpu").text_encoder_3 is None
    assert load_pipeline(tmp_path / "with", "cpu", t5=True).text_encoder_3 is not None
    shutil.rmtree(tmp_path / "with" / "text_encoder_3")  # its largest part, which many do not download
    assert load_pipeline(tmp_path / "with", "cpu").text_encoder_3 is None
    with pytest.raises(FileNotFoundError, match="missing in: text_encoder_3"):
        load_pipeline(tmp_path / "with", "cpu", t5=True)


@pytest.mark.parametrize(
    "part",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_missing_files_are_named(copy, part):
    (copy / part).unlink()
    folder, name = part.split("/")
    with pytest.raises(FileNotFoundError, match="get a whole copy") as error:
        load_pipeline(copy, "cpu")
    assert folder in str(error.value)
    assert "config.json" in str(error.value) if "config" in name else name in str(error.value)


def test_missing_parts_are_named_at_once(copy):
    shutil.rmtree(copy / "vae")
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match=r"missing in: .*\bvae\b.*; get") as error:
        load_pipeline(copy, "cpu")
    assert "tokenizer_2" in str(error.value)


def test_missing_shards_are_named(copy):
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    index = {"metadata": {}, "weight_map": {"a": "part-1.safetensors", "b": weights.name}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors.*get a whole copy"):
        load_pipeline(copy, "cpu")


@pytest.mark.parametrize(
    "part",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_damaged_files_are_named(copy, part):
    content = (copy / part).read_bytes()
    (copy / part).write_bytes(content[: len(content) // 2])
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{part} is damaged.*get a whole copy"):
        load_pipeline(copy, "cpu")


def test_pickled_weights_are_not_read(copy):
    weights = copy / "text_encoder" / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file named model\.safetensors.*text_encoder"):
        load_pipeline(copy, "cpu")


def test_not_a_pipeline(copy):
    (copy / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json' is damaged"):
        load_pipeline(copy)
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "UnetPipeline"}))
    with pytest.raises(ValueError, match="is a UnetPipeline; supported: .*Flux.1, .*Stable Diffusion 3"):
        load_pipeline(copy)
    (copy / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no model_index.json.*save_pretrained"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "nowhere", "~/model", "a/b/c", "a/b.safetensors"]
)
def test_neither_folder_nor_name(name):
    with pytest.raises(FileNotFoundError, match="neither 'demo', nor a folder"):
        load_pipeline(name)


def test_devices(saved, monkeypatch):
    with pytest.raises(ValueError, match="device='tpu9000' is unknown"):
        load_pipeline(saved, "tpu9000")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", torch.device("cuda:1")):
        with pytest.raises(ValueError, match="no CUDA device is available.*use device cpu"):
            load_pipeline(saved, device)
    with pytest.raises(ValueError, match="offload=True needs a GPU"):
        load_pipeline(saved, "cpu", offload=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="the last of 2 CUDA devices is cuda:1"):
        load_pipeline(saved, "cuda:2")


@pytest.mark.parametrize(
    ("cuda", "mps", "macos", "device", "dtype"),
    [
        (True, True, 14, "cuda", torch.bfloat16),
        (False, True, 14, "mps", torch.bfloat16),
        (False, True, 13, "mps", torch.float32),
        (False, False, 0, "cpu", torch.float32),
    ],
)
def test_device_and_precision_by_default(cuda, mps, macos, device, dtype, saved, monkeypatch):
    moves = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
    monkeypatch.setattr(
        diffusers.StableDiffusion3Pipeline, "to", lambda self, place: moves.append(place.type) or self
    )
    pipe = load_pipeline(saved)
    assert moves == ([device] if device != "cpu" else [])
    assert pipe.transformer.dtype == dtype


def test_unknown_precision(saved):
    for dtype in ("int8", torch.int8):
        with pytest.raises(ValueError, match="use float32, bfloat16, float16"):
            load_pipeline(saved, "cpu", dtype)


def hub(monkeypatch, error):
    import huggingface_hub

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


def test_hub_out_of_reach(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for error in (LocalEntryNotFoundError("no"), OfflineModeIsEnabled("no"), ConnectionError("no")):
        hub(monkeypatch, error)
        with pytest.raises(ConnectionError, match=r"'some/model'.*hf download some/model.*--model demo"):
            load_pipeline("some/model", "cpu")


def test_hub_refuses(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    def made(kind):
        error = kind.__new__(kind)
        Exception.__init__(error, "refused")
        return error

    for kind, expected, message in (
        (GatedRepoError, PermissionError, "licence accepted.*hf auth login"),
        (RepositoryNotFoundError, FileNotFoundError, "neither a local folder nor on the hub"),
        (EntryNotFoundError, FileNotFoundError, "not in diffusers' format"),
    ):
        hub(monkeypatch, made(kind))
        with pytest.raises(expected, match=message):
            load_pipeline("some/model", "cpu")


def test_hub_name_loads_what_the_hub_gives(saved, monkeypatch):
    import diffusers
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(saved / file))
    given = {}
    original = diffusers.StableDiffusion3Pipeline.from_pretrained

    def from_pretrained(name, **arguments):
        given.update(arguments, name=name)
        return original(saved, **arguments)

    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", from_pretrained)
    pipe = load_pipeline("some/model", "cpu", "bfloat16")
    assert given["name"] == "some/model"
    assert given["text_encoder_3"] is None
    assert given["tokenizer_3"] is None
    assert pipe.transformer.dtype == torch.bfloat16


def test_out_of_memory(saved, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "_from_folder", refuse)
    with pytest.raises(MemoryError, match=f"out of memory while loading '{saved}'.*offload"):
        load_pipeline(saved, "cpu")
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert "--batch-size" in out_of_memory_remedy("dreaming")


EVIL = """
import pathlib
pathlib.Path({witness!r}).touch()
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPConfig

class Evil(FlowMatchEulerDiscreteScheduler): ...
class EvilModel(SD3Transformer2DModel): ...
class EvilConfig(CLIPConfig): ...
"""


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("scheduler", ["payload", "Evil"]),  # a module of the folder
        ("scheduler", ["subprocess", "Popen"]),  # one that is imported already
        ("safety", {"checker": [["payload", "Evil"]]}),
        ("text_encoder", ["os.path", {"class": "join"}]),
    ],
)
def test_models_of_other_libraries_are_refused(copy, part, entry, tmp_path, monkeypatch):
    for folder in (copy, copy / "scheduler"):
        (folder / "payload.py").write_text(EVIL.format(witness=str(tmp_path / "ran")))
    monkeypatch.chdir(copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, part: entry}))
    with pytest.raises(ValueError, match=rf"{copy}.*could run its own code.*'{part}'.*correct the entry"):
        load_pipeline(copy, "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["scheduler", "transformer", "text_encoder", "None.py"])
def test_code_beside_the_weights_does_not_run(copy, place, tmp_path):
    """Python files of a folder are ignored, or end the loading, but never run."""
    code = EVIL.format(witness=str(tmp_path / "ran"))
    if place == "None.py":  # diffusers looks for a pipeline in NAME.py, also where no name was given
        (copy / place).write_text(code)
    else:
        for name in ("payload.py", "diffusers.py", "transformers.py"):
            (copy / place / name).write_text(code)
        configuration = next((copy / place).glob("*config.json"))
        custom = {"AutoConfig": "payload.EvilConfig", "AutoModel": "payload.EvilModel"}
        content = {**json.loads(configuration.read_text()), "auto_map": custom}
        configuration.write_text(json.dumps(content))
    if place == "transformer":
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps({**index, place: ["diffusers", "AutoModel"]}))
    # Another class for the transformer is not a known family; what is left to diffusers, it refuses.
    refusal = "supported: .*Flux.1, " if place == "transformer" else "trust_remote_code"
    with pytest.raises(ValueError, match=refusal):
        load_pipeline(copy, "cpu")
    assert not (tmp_path / "ran").exists()
