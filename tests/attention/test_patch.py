"""The patch lives with everything else people do to a pipeline, and leaves without a trace."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import seg4diff
from tests.support import tiny
from tests.support.compiling import compile_counter
from tests.support.hooked import hooked_projections, image_to_text
from tests.support.tiny import CALL


def draw(pipe: Any) -> torch.Tensor:
    return pipe("a cat on a sofa", generator=torch.Generator().manual_seed(0), **CALL).images


def cat_map(pipe: Any, layers: list[int] | None = None) -> torch.Tensor:
    with seg4diff.capture(pipe, layers) as captured:
        draw(pipe)
    return captured.heatmap("cat")


def hooks_of(transformer: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules())


def test_patch_is_idempotent_and_unpatch_exact() -> None:
    pipe = tiny.pipeline(dual=(0,), qk_norm="rms_norm")
    transformer = pipe.transformer
    processors, attributes = transformer.attn_processors, set(transformer.__dict__)
    modules, before = list(transformer.modules()), draw(pipe)
    names = list(transformer.state_dict())
    assert not seg4diff.is_patched(pipe)
    assert seg4diff.patch(pipe) is pipe
    assert seg4diff.patch(pipe) is pipe
    assert seg4diff.is_patched(pipe)
    assert seg4diff.is_patched(transformer)
    assert torch.equal(draw(pipe), before)
    cat_map(pipe)
    with seg4diff.capture(transformer, 1, stop_early=True), torch.no_grad():
        transformer(**tiny.transformer_inputs())
        assert list(transformer.modules()) == modules
        assert not [name for name in transformer.state_dict() if name not in names]
    assert seg4diff.unpatch(pipe) is pipe
    assert seg4diff.unpatch(pipe) is pipe
    assert not seg4diff.is_patched(pipe)
    now = transformer.attn_processors
    assert list(now) == list(processors)
    assert all(now[name] is processors[name] for name in processors)
    assert list(transformer.modules()) == modules
    assert set(transformer.__dict__) == attributes
    assert hooks_of(transformer) == 0
    assert "encode_prompt" not in pipe.__dict__
    assert torch.equal(draw(pipe), before)


def test_only_the_layers_asked_for_are_touched() -> None:
    pipe = seg4diff.patch(tiny.pipeline())
    stock = [block.attn.processor for block in pipe.transformer.transformer_blocks]
    with seg4diff.capture(pipe, 1):
        inside = [block.attn.processor for block in pipe.transformer.transformer_blocks]
        assert (inside[0], inside[2]) == (stock[0], stock[2])
        assert inside[1] is not stock[1]
    assert [block.attn.processor for block in pipe.transformer.transformer_blocks] == stock


def test_everything_is_restored_after_an_exception() -> None:
    pipe = seg4diff.patch(tiny.pipeline())
    before, processors = draw(pipe), pipe.transformer.attn_processors

    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), seg4diff.capture(pipe, [0, 1], stop_early=True):
        pipe("a cat", callback_on_step_end=fail, **CALL)
    handle = pipe.transformer.transformer_blocks[1].norm1.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), seg4diff.capture(pipe, [0, 1]):
        draw(pipe)
    handle.remove()
    assert pipe.transformer.attn_processors == processors
    assert hooks_of(pipe.transformer) == 0
    assert "encode_prompt" not in pipe.__dict__
    assert torch.equal(draw(pipe), before)


def test_unpatch_inside_a_context_wins() -> None:
    pipe = seg4diff.patch(tiny.pipeline())
    processors = pipe.transformer.attn_processors
    with seg4diff.capture(pipe, 1):
        seg4diff.unpatch(pipe)
        assert pipe.transformer.attn_processors == processors
    assert pipe.transformer.attn_processors == processors


@torch.no_grad()
def test_state_dict_and_copies() -> None:
    pipe = tiny.pipeline()
    names = list(pipe.transformer.state_dict())
    seg4diff.patch(pipe)
    with seg4diff.capture(pipe, 1):
        assert list(pipe.transformer.state_dict()) == names
        clone = copy.deepcopy(pipe.transformer)
        with seg4diff.capture(pipe.transformer, 1) as captured:
            clone(**tiny.transformer_inputs())
            assert captured.records == ()
    assert not seg4diff.is_patched(clone)
    with seg4diff.capture(pipe.transformer, 1, stop_early=True):
        assert list(pipe.transformer.state_dict()) == names
        clone = copy.deepcopy(pipe.transformer)
    inputs = tiny.transformer_inputs()
    assert torch.equal(clone(**inputs).sample, pipe.transformer(**inputs).sample)


def test_a_patch_keeps_no_model_alive() -> None:
    pipe = seg4diff.patch(tiny.pipeline())
    cat_map(pipe)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_pipelines_that_share_a_transformer_share_the_patch() -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    pipe = seg4diff.patch(tiny.pipeline())
    other = StableDiffusion3Img2ImgPipeline(**pipe.components)
    assert seg4diff.is_patched(other)
    image = torch.rand(1, 3, 64, 64)
    arguments = {
        "num_inference_steps": 2,
        "strength": 1.0,
        "output_type": "latent",
        "max_sequence_length": 77,
    }
    with seg4diff.capture(other, 1) as captured:
        other("red sofa", image=image, **arguments)
    assert captured.heatmap("sofa").shape == (64, 64)
    assert captured.records[0].maps.shape[0] == 1
    seg4diff.unpatch(other)
    assert not seg4diff.is_patched(pipe)


@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora_before_and_after_the_patch(first: str, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    plain = tiny.pipeline()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["attn.to_q", "attn.to_k"], init_lora_weights=False)
    torch.manual_seed(0)
    plain.transformer.add_adapter(config)
    expected = draw(plain)
    layers = get_peft_model_state_dict(plain.transformer)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

    pipe = tiny.pipeline()
    untrained = cat_map(seg4diff.patch(tiny.pipeline()), [2])
    if first == "patch":
        seg4diff.patch(pipe)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    if first == "lora":
        seg4diff.patch(pipe)
    torch.testing.assert_close(draw(pipe), expected)
    with seg4diff.capture(pipe, 2) as captured:
        torch.testing.assert_close(draw(pipe), expected)
    assert not torch.allclose(captured.heatmap("cat"), untrained, rtol=1e-3)
    seg4diff.unpatch(pipe)
    torch.testing.assert_close(draw(pipe), expected)


@pytest.mark.parametrize("how", ["sequential", "group leaf", "group block"])
def test_offloading(how: str) -> None:
    expected_pipe = seg4diff.patch(tiny.pipeline())
    expected, expected_map = draw(expected_pipe), cat_map(expected_pipe)
    inputs = tiny.transformer_inputs()
    pipe = seg4diff.patch(tiny.pipeline())
    transformer = pipe.transformer
    if how == "sequential":
        from accelerate import cpu_offload

        cpu_offload(transformer, execution_device="cpu", offload_buffers=False)
    else:
        kind = "leaf_level" if how == "group leaf" else "block_level"
        transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=None if kind == "leaf_level" else 1,
        )
    devices = {name: p.device for name, p in transformer.named_parameters()}
    torch.testing.assert_close(draw(pipe), expected)
    torch.testing.assert_close(cat_map(pipe), expected_map)
    with torch.no_grad():
        with seg4diff.capture(expected_pipe.transformer, 1) as whole:
            expected_pipe.transformer(**inputs)
        with seg4diff.capture(transformer, 1, stop_early=True) as part:
            transformer(**inputs)
    torch.testing.assert_close(part.records[0].maps, whole.records[0].maps)
    assert {name: p.device for name, p in transformer.named_parameters()} == devices
    torch.testing.assert_close(draw(pipe), expected)


def test_autocast() -> None:
    for arguments in ({}, {"qk_norm": "rms_norm"}):
        transformer = seg4diff.patch(tiny.transformer(**arguments))
        inputs = tiny.transformer_inputs()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            stock = transformer(**inputs).sample
            with seg4diff.capture(transformer, 1) as captured:
                output = transformer(**inputs).sample
        assert output.dtype == stock.dtype
        torch.testing.assert_close(output, stock, rtol=0.02, atol=0.02)
        with torch.no_grad(), seg4diff.capture(transformer, 1) as exact:
            transformer(**inputs)
        assert captured.records[0].maps.dtype == torch.float32
        torch.testing.assert_close(captured.records[0].maps, exact.records[0].maps, rtol=0.1, atol=0)


@pytest.mark.parametrize("how", ["wrapper", "in place", "blocks"])
@torch.no_grad()
def test_torch_compile(how: str) -> None:
    expected_pipe = seg4diff.patch(tiny.pipeline(layers=4))
    expected, expected_map = draw(expected_pipe), cat_map(expected_pipe, [1, 2])
    pipe = seg4diff.patch(tiny.pipeline(layers=4))
    torch._dynamo.reset()
    backend = CompileCounter()
    if how == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    elif how == "in place":
        pipe.transformer.compile(backend=backend, fullgraph=True)
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(draw(pipe), expected)
    torch.testing.assert_close(cat_map(pipe, [1, 2]), expected_map)
    with seg4diff.capture(pipe, [1, 2], steps="each") as captured:
        torch.testing.assert_close(draw(pipe), expected)
    assert len(captured.records) == 4
    settled = backend.frame_count
    assert 0 < settled <= 6, f"{settled} graphs"
    torch.testing.assert_close(cat_map(pipe, [1, 2]), expected_map)
    draw(pipe)
    assert backend.frame_count == settled, "a second capture compiled again"
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # its imports
@torch.no_grad()
def test_inductor() -> None:
    """The compiler that users get; everywhere else its front end alone is tested."""
    transformer = seg4diff.patch(tiny.transformer())
    inputs = tiny.transformer_inputs()
    with seg4diff.capture(transformer, [0, 1]) as expected:
        output = transformer(**inputs).sample
    torch._dynamo.reset()
    transformer.compile(fullgraph=True)
    with seg4diff.capture(transformer, [0, 1]) as captured:
        torch.testing.assert_close(transformer(**inputs).sample, output)
    for ours, theirs in zip(captured.records, expected.records, strict=True):
        torch.testing.assert_close(ours.maps, theirs.maps, rtol=1e-4, atol=0)
    torch._dynamo.reset()


@torch.no_grad()
def test_compiling_while_a_capture_holds_the_model() -> None:
    """The graph then holds the hooks; two forwards are two records, and the second compiles nothing."""
    transformer = tiny.transformer()
    inputs, others = tiny.transformer_inputs(), tiny.transformer_inputs(seed=2)
    with seg4diff.capture(transformer) as expected:
        transformer(**inputs)
        transformer(**others)
    torch._dynamo.reset()
    backend, graphs = compile_counter()
    with seg4diff.capture(transformer) as captured:
        compiled = torch.compile(transformer, backend=backend, fullgraph=True)
        output = compiled(**inputs).sample
        settled = len(graphs)
        compiled(**others)
    assert settled == 1
    assert len(graphs) <= 2, "each forward compiled again"
    assert [(r.layer, r.call, r.grid) for r in captured.records] == [
        (r.layer, r.call, r.grid) for r in expected.records
    ]
    for record, exact in zip(captured.records, expected.records, strict=True):
        torch.testing.assert_close(record.maps, exact.maps, rtol=1e-5, atol=0)
    torch.testing.assert_close(output, transformer(**inputs).sample)
    torch._dynamo.reset()


@torch.no_grad()
def test_fused_projections(pipe: Any) -> None:
    """Fusing before or after the patch, and undoing it, changes no map."""
    own = tiny.pipeline()
    drawn, expected = draw(own), cat_map(own)
    own.transformer.fuse_qkv_projections()
    fused = [type(block.attn.processor).__name__ for block in own.transformer.transformer_blocks]
    assert fused == ["FusedJointAttnProcessor2_0"] * 3
    torch.testing.assert_close(cat_map(own), expected)
    assert [type(b.attn.processor).__name__ for b in own.transformer.transformer_blocks] == fused
    own.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(cat_map(own), expected)
    assert torch.equal(draw(own), drawn)


@torch.no_grad()
def test_ip_adapter() -> None:
    """The joint attention is captured, the adapter's own attention runs as ever, whatever their lengths."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    transformer = tiny.transformer()
    inputs = tiny.transformer_inputs()
    torch.manual_seed(0)
    adapters = {}
    for name in transformer.attn_processors:
        adapter = SD3IPAdapterJointAttnProcessor2_0(hidden_size=16, ip_hidden_states_dim=16, head_dim=8)
        adapters[name] = adapter.eval()
    transformer.set_attn_processor(dict(adapters))
    for tokens in (4, 9, 33):  # 9: as many keys as image and text tokens have together
        given = {"ip_hidden_states": torch.randn(2, tokens, 16), "temb": torch.randn(2, 1280)}
        stock = transformer(**inputs, joint_attention_kwargs=given).sample
        with hooked_projections(transformer) as projections:
            transformer(**inputs, joint_attention_kwargs=given)
        with seg4diff.capture(transformer, [0, 2]) as captured:
            output = transformer(**inputs, joint_attention_kwargs=given).sample
        torch.testing.assert_close(output, stock)
        for record in captured.records:
            exact = image_to_text(projections[record.layer]).mean(dim=1)
            torch.testing.assert_close(record.maps.double(), exact, rtol=1e-5, atol=0)
    assert all(adapters[name] is now for name, now in transformer.attn_processors.items())


def test_unknown_processors_are_refused_by_name() -> None:
    from diffusers.models.attention_processor import AttnProcessor, PAGJointAttnProcessor2_0

    class Mine:
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states

    transformer = tiny.transformer()
    for processor in (Mine(), AttnProcessor(), PAGJointAttnProcessor2_0()):
        transformer.transformer_blocks[1].attn.processor = processor
        with pytest.raises(
            ValueError, match=f"layer 1 runs the attention processor {type(processor).__name__}"
        ):
            seg4diff.patch(transformer)
    sharded = type(transformer.transformer_blocks[0].attn.processor)()
    sharded._parallel_config = object()
    transformer.transformer_blocks[1].attn.processor = sharded
    with pytest.raises(NotImplementedError, match="JointAttnProcessor2_0 shards its tokens over devices"):
        seg4diff.patch(transformer)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_unsupported_models_are_refused_by_name() -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel(sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(
        NotImplementedError, match="UNet2DModel is not supported; supported: .*SD3Transformer2DModel"
    ):
        seg4diff.patch(unet)
    with pytest.raises(TypeError, match="neither|not a diffusers pipeline"):
        seg4diff.patch("stabilityai/stable-diffusion-3-medium-diffusers")


@torch.no_grad()
def test_edits_that_cannot_reach_the_attention_raise() -> None:
    """Where every attention call is left to diffusers, an edit would do nothing and say nothing."""
    from seg4diff.attention.interception import Answer, Interceptor

    class Nothing(Answer):
        def __call__(self, *_: Any) -> None:
            return None

    transformer = tiny.transformer()
    attention = transformer.transformer_blocks[0].attn
    attention.processor = Interceptor(type(attention.processor)).intercepted(attention.processor, Nothing())
    with pytest.raises(RuntimeError, match="JointAttnProcessor2_0 made no joint attention call"):
        transformer(**tiny.transformer_inputs())

    whole = tiny.transformer()
    # Less text than the transformer was called with: nothing has the length of the whole sequence.
    whole.context_embedder.register_forward_hook(lambda m, a, out: out[:, 1:])
    with seg4diff.perturb(whole, 0), pytest.raises(RuntimeError, match="made no joint attention call"):
        whole(**tiny.transformer_inputs())
