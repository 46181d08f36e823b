"""Captured maps against hooks on a stock model; what a capture leaves behind; words."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import seg4diff
from seg4diff.attention.capture import Capture, _Limit
from seg4diff.attention.requests import LayerRequest
from seg4diff.backbones import Layout, TransformerCall
from seg4diff.kernels.testing import assert_accurate, error_ratio
from seg4diff.kernels.types import MapRequest
from tests.support import tiny
from tests.support.hooked import hooked_projections, image_to_text
from tests.support.tiny import seeded

MODELS = {"sd3": {}, "sd3.5": {"dual": (0, 1), "qk_norm": "rms_norm"}}
CALL: dict[str, Any] = {**tiny.CALL, "num_inference_steps": 3}


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_maps_equal_hooks(model: str) -> None:
    transformer = seg4diff.patch(tiny.transformer(**MODELS[model]))
    inputs = tiny.transformer_inputs()
    with hooked_projections(transformer) as stock_projections:
        stock = transformer(**inputs).sample
    with hooked_projections(transformer) as projections, seg4diff.capture(transformer) as captured:
        output = transformer(**inputs).sample
    torch.testing.assert_close(output, stock)
    assert [record.layer for record in captured.records] == [0, 1, 2]
    for record in captured.records:
        exact = image_to_text(projections[record.layer]).mean(dim=1)
        baseline = image_to_text(projections[record.layer], torch.float32).mean(dim=1)
        assert record.maps is not None
        assert_accurate(record.maps, exact, baseline, name=f"layer {record.layer}")
        # Against the stock forward, too: what separates them is the rounding of the layers before.
        stock_maps = image_to_text(stock_projections[record.layer]).mean(dim=1)
        torch.testing.assert_close(record.maps.double(), stock_maps, rtol=1e-3, atol=0)
        assert record.grid == (4, 6)
        assert record.timestep == 500.0


@torch.no_grad()
def test_wrong_maps_would_be_noticed() -> None:
    """The comparison above rejects zeros, another layer, a single head, shifted tokens and mixed streams."""
    transformer = seg4diff.patch(tiny.transformer())
    with hooked_projections(transformer) as projections, seg4diff.capture(transformer) as captured:
        transformer(**tiny.transformer_inputs())
    record = captured.records[1]
    assert record.maps is not None
    per_head = image_to_text(projections[1])
    exact = per_head.mean(dim=1)
    baseline = image_to_text(projections[1], torch.float32).mean(dim=1)
    assert error_ratio(record.maps, exact, baseline) <= 1
    swapped = {**projections[1], "to_k": projections[1]["add_k_proj"], "add_k_proj": projections[1]["to_k"]}
    keys_swapped = image_to_text(swapped)[..., : exact.shape[-1]].mean(dim=1)
    wrong = {
        "zeros": torch.zeros_like(exact),
        "another layer": image_to_text(projections[2]).mean(dim=1),
        "one head": per_head[:, 0],
        "shifted tokens": exact.roll(1, dims=2),
        "shifted rows": exact.roll(1, dims=1),
        "streams swapped": keys_swapped,
    }
    for what, maps in wrong.items():
        assert error_ratio(maps.float(), exact, baseline) > 10, what


@pytest.mark.parametrize(
    ("kind", "heads"), [("probability", "each"), ("logit", "each"), ("text_probability", "mean")]
)
@torch.no_grad()
def test_requests_reach_the_kernel(kind: Any, heads: Any) -> None:
    transformer = seg4diff.patch(tiny.transformer())
    request = MapRequest(kind=kind, heads=heads, columns=("text", slice(2, 7)))
    with (
        hooked_projections(transformer) as projections,
        seg4diff.capture(transformer, 1, maps=request) as captured,
    ):
        transformer(**tiny.transformer_inputs())
    query, key = projections[1]["to_q"].double(), projections[1]["add_k_proj"].double()
    logits = torch.einsum("bnhd,bthd->bhnt", query, key) / query.shape[-1] ** 0.5
    exact = {
        "probability": image_to_text(projections[1]),
        "logit": logits,
        "text_probability": logits.softmax(dim=-1),
    }[kind][..., 2:7]
    exact = {"each": exact, "mean": exact.mean(dim=1)}[heads]
    torch.testing.assert_close(captured.records[0].maps.double(), exact, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_statistics_equal_hooks() -> None:
    transformer = seg4diff.patch(tiny.transformer())
    capture = seg4diff.capture(transformer, 1, maps=None, statistics=True)
    with hooked_projections(transformer) as projections, capture as captured:
        transformer(**tiny.transformer_inputs())
    record = captured.records[0]
    assert record.maps is None
    statistics = record.statistics
    assert statistics is not None
    exact = image_to_text(projections[1]).sum(dim=-1)
    torch.testing.assert_close(statistics.image_to_text.double(), exact, rtol=1e-5, atol=0)
    norms = projections[1]["add_v_proj"].double().norm(dim=-1).transpose(1, 2)
    torch.testing.assert_close(statistics.text_value_norm.double(), norms, rtol=1e-5, atol=0)


@torch.no_grad()
def counted(name: str, forward: Any, called: list[str]) -> Any:
    """The forward, which says when it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return forward(*args, **kwargs)

    return run


def test_stopping_early_gives_the_same_maps_for_less() -> None:
    for model in MODELS.values():
        transformer = seg4diff.patch(tiny.transformer(**model))
        inputs = tiny.transformer_inputs()
        with seg4diff.capture(transformer, [0, 1]) as whole:
            stock = transformer(**inputs).sample
        called: list[str] = []
        leaves = {name: module for name, module in transformer.named_modules() if not list(module.children())}
        for name, module in leaves.items():
            module.forward = counted(name, module.forward, called)
        with seg4diff.capture(transformer, [0, 1], stop_early=True) as part:
            transformer(**inputs)
        for module in leaves.values():
            del module.forward
        for full, early in zip(whole.records, part.records, strict=True):
            torch.testing.assert_close(early.maps, full.maps, rtol=1e-5, atol=0)
        ran = {name.split(".", 2)[2] for name in called if name.startswith("transformer_blocks.1.")}
        assert {"attn.to_q", "attn.to_k", "attn.add_k_proj"} <= ran
        unwanted = ("to_v", "to_out.0", "add_q_proj", "add_v_proj", "to_add_out", "ff", "ff_context", "attn2")
        assert not [name for name in ran if any(f".{name}.".find(f".{part}.") >= 0 for part in unwanted)]
        assert not [name for name in called if name.startswith("transformer_blocks.2.")]
        torch.testing.assert_close(transformer(**inputs).sample, stock)


@torch.no_grad()
def test_pipeline_call_averages_the_conditional_half(pipe: Any) -> None:
    with seg4diff.capture(pipe, [1, 2]) as mean:
        drawn = pipe("a cat on a sofa", generator=seeded(), **CALL).images
    with seg4diff.capture(pipe, [1, 2], steps="each", branch="both") as each:
        again = pipe("a cat on a sofa", generator=seeded(), **CALL).images
    assert torch.equal(drawn, again)
    torch.testing.assert_close(pipe("a cat on a sofa", generator=seeded(), **CALL).images, drawn)
    assert len(mean.records) == 2
    assert len(each.records) == 2 * 3
    for record in mean.records:
        steps = [r for r in each.records if r.layer == record.layer]
        assert record.timestep == tuple(r.timestep for r in steps)
        assert len(record.timestep) == 3
        conditional = torch.stack([r.maps[1:] for r in steps]).mean(dim=0)
        torch.testing.assert_close(record.maps, conditional, rtol=1e-5, atol=0)
        assert not torch.allclose(
            record.maps, torch.stack([r.maps[:1] for r in steps]).mean(dim=0), rtol=1e-3
        )
    with seg4diff.capture(pipe, 1) as one_step:
        pipe("a cat", generator=seeded(), **{**CALL, "num_inference_steps": 1})
    assert one_step.records[0].timestep == (1000.0,)
    with seg4diff.capture(pipe, 1, branch="unconditional") as other:
        pipe("a cat on a sofa", generator=seeded(), **CALL)
    unconditional = torch.stack([r.maps[:1] for r in each.records if r.layer == 1]).mean(dim=0)
    torch.testing.assert_close(other.records[0].maps, unconditional, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@torch.no_grad()
def test_chosen_steps_are_those_of_all_steps(family: str) -> None:
    """Flux runs the branches of guidance in forwards of their own."""
    pipe = tiny.pipeline() if family == "sd3" else tiny.flux_pipeline()
    call = {**CALL, "num_inference_steps": 4}
    if family == "flux":
        call = {**call, "true_cfg_scale": 3.0, "negative_prompt": "tree"}

    def maps(**arguments: Any) -> list[torch.Tensor]:
        with seg4diff.capture(pipe, [0, 2], branch="both", **arguments) as captured:
            pipe("a cat on a sofa", generator=seeded(), **call)
        return [record.maps for record in captured.records]

    each = maps(steps="each")
    assert len(each) == 8
    for steps, numbers in (("last", [3]), (1, [1]), ([2, -4, 2], [0, 2]), ([-1], [3])):
        chosen = maps(steps=steps)
        expected = [each[2 * number + layer] for number in numbers for layer in (0, 1)]
        assert len(chosen) == len(expected)
        for found, exact in zip(chosen, expected, strict=True):
            assert torch.equal(found, exact)
    assert not torch.allclose(each[0], each[6], rtol=1e-3)


@torch.no_grad()
def test_steps_that_a_call_does_not_have(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (3, -4, [0, 3]):
        with seg4diff.capture(pipe, steps=steps), pytest.raises(ValueError, match="the steps 0 to 2"):
            pipe("a cat", **CALL)
    monkeypatch.setattr(type(pipe), "num_timesteps", property(lambda _: None))
    with seg4diff.capture(pipe, steps="last"), pytest.raises(ValueError, match="numbers from 0"):
        pipe("a cat", **CALL)
    with seg4diff.capture(pipe, 0, steps=[0, 2]) as captured:
        pipe("a cat", **CALL)
    assert len(captured.records) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": "each", "maps": MapRequest(heads="each")},
        {"steps": "last", "maps": MapRequest(columns=("text", slice(3, 10))), "layers": [0, 1]},
        {"steps": "mean", "statistics": True},
        {"steps": [0, 1], "branch": "both", "maps": MapRequest(rows=("image", torch.tensor([3, 1])))},
    ],
    ids=["heads", "columns", "statistics", "both branches"],
)
@torch.no_grad()
def test_a_capture_that_is_too_large_is_refused_before_it_runs(pipe: Any, arguments: dict[str, Any]) -> None:
    """The limit is exact: it passes at the size of the records and not one byte below."""
    with seg4diff.capture(pipe, **arguments) as captured:
        pipe(["a cat", "a dog"], **CALL)
    tensors = [record.maps for record in captured.records]
    for record in captured.records:
        if record.statistics is not None:
            tensors += list(vars(record.statistics).values())
    size = sum(tensor.nbytes for tensor in tensors)
    with seg4diff.capture(pipe, **arguments, max_bytes=size):
        pipe(["a cat", "a dog"], **CALL)
        with pytest.raises(MemoryError, match=r"beside .* recorded before.*heads=\"mean\""):
            pipe("a cat", **CALL)
    ran: list[int] = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with (
        seg4diff.capture(pipe, **arguments, max_bytes=size - 1),
        pytest.raises(MemoryError, match="above the limit"),
    ):
        pipe(["a cat", "a dog"], **CALL)
    hook.remove()
    assert not ran


def test_the_size_of_everything_at_1024_pixels() -> None:
    """24 layers and heads, 28 steps, 4096 image and 333 text tokens in float32 are 88 GB."""
    layout = Layout(False, image_tokens=4096, text_tokens=333, generated=4096)
    text = torch.empty(2, 333, 1, dtype=torch.bfloat16)
    call = TransformerCall((64, 64), layout, text, 2, None)
    limit = _Limit(4 * 2**30, LayerRequest(maps=MapRequest(heads="each")), (24,) * 24)
    with pytest.raises(MemoryError, match=r"81.9 GiB \(24 layers, 28 steps, 1 rows\)"):
        limit.add(call, 1, 28)
    assert round(81.9 * 2**30 / 1e9) == 88


@torch.no_grad()
def test_bare_forwards_add_up_to_the_limit() -> None:
    transformer = tiny.transformer()
    one = 3 * 2 * 24 * 9 * 4
    with seg4diff.capture(transformer, max_bytes=2 * one):
        transformer(**tiny.transformer_inputs())
        transformer(**tiny.transformer_inputs())
        with pytest.raises(MemoryError):
            transformer(**tiny.transformer_inputs())


@torch.no_grad()
def test_records_are_kept_on_another_device(pipe: Any) -> None:
    with seg4diff.capture(pipe, 1, device="meta", branch="both", statistics=True) as captured:
        pipe("a cat", **CALL)
    (record,) = captured.records
    assert record.maps.is_meta
    assert record.statistics.image_value_norm.is_meta
    assert record.maps.shape == (2, 16, 154)


@torch.no_grad()
def test_batches_and_calls_are_kept_apart(pipe: Any) -> None:
    with seg4diff.capture(pipe, 1) as captured:
        pipe(["a cat", "red tree"], num_images_per_prompt=2, generator=seeded(), **CALL)
        pipe("dog", generator=seeded(), **CALL)
        pipe.transformer(**tiny.transformer_inputs(batch=2))
    assert [r.call for r in captured.records] == [0, 1, 2]
    assert [len(r.maps) for r in captured.records] == [4, 1, 2]
    with seg4diff.capture(pipe, 1) as captured:
        pipe(["a cat", "red tree"], num_images_per_prompt=2, generator=seeded(), **CALL)
    for image, word in ((0, "cat"), (1, "cat"), (2, "tree"), (3, "tree")):
        assert captured.heatmap(word, image=image).shape == (64, 64)
    with pytest.raises(ValueError, match="known words: red, tree"):
        captured.heatmap("cat", image=2)
    with pytest.raises(IndexError, match="images 0 to 3"):
        captured.heatmap("cat", image=4)


@torch.no_grad()
def test_skip_layer_guidance_counts_a_step_once(pipe: Any) -> None:
    guided = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    for layer in (0, 2):  # before and after the layer that is skipped
        with seg4diff.capture(pipe, layer) as captured:
            pipe("a cat", generator=seeded(), **CALL, **guided)
        assert len(captured.records[0].timestep) == 3
        assert captured.records[0].maps.shape[0] == 1


@torch.no_grad()
def test_heatmap_is_the_mean_over_the_words_tokens(pipe: Any) -> None:
    with seg4diff.capture(pipe, [0, 2]) as captured:
        pipe("A Cat, on a red sofa; cat", generator=seeded(), **CALL)
    maps = torch.stack([r.maps[0] for r in captured.records]).mean(dim=0)
    ids = pipe.tokenizer("A Cat, on a red sofa; cat", padding="max_length", max_length=77).input_ids
    cats = [i for i, token in enumerate(ids) if token == pipe.tokenizer("cat").input_ids[1]]
    assert len(cats) == 2
    torch.testing.assert_close(captured.heatmap("cat", resize=False), maps[:, cats].mean(dim=1).reshape(4, 4))
    phrase = captured.heatmap("RED  sofa", resize=False)
    first = ids.index(pipe.tokenizer("red").input_ids[1])
    torch.testing.assert_close(phrase, maps[:, [first, first + 1]].mean(dim=1).reshape(4, 4))
    assert captured.heatmap("cat", layers=2, resize=False).equal(
        captured.records[1].maps[0][:, cats].mean(dim=1).reshape(4, 4)
    )
    assert captured.heatmap("cat").shape == (64, 64)
    for word in ("dog", "ca", " ", "cat red"):
        with pytest.raises(ValueError, match="known words: a, cat, on, red, sofa"):
            captured.heatmap(word)
    with pytest.raises(ValueError, match=r"captured layers: \[0, 2\]"):
        captured.heatmap("cat", layers=1)


@torch.no_grad()
def test_heatmap_with_t5_and_with_embeddings() -> None:
    pipe = seg4diff.patch(tiny.pipeline(t5=True))
    call = {**CALL, "max_sequence_length": 20}
    with seg4diff.capture(pipe, 1) as captured:
        pipe("a cat on a sofa", generator=seeded(), **call)
    maps = captured.records[0].maps[0]
    assert maps.shape[-1] == 97
    assert "▁cat" in pipe.tokenizer_3.tokenize("a cat on a sofa")
    t5 = pipe.tokenizer_3("a cat on a sofa").input_ids.index(pipe.tokenizer_3.convert_tokens_to_ids("▁cat"))
    torch.testing.assert_close(captured.heatmap("cat", encoder="clip", resize=False).flatten(), maps[:, 2])
    torch.testing.assert_close(
        captured.heatmap("cat", encoder="t5", resize=False).flatten(), maps[:, 77 + t5]
    )
    both = captured.heatmap("cat", resize=False).flatten()
    torch.testing.assert_close(both, maps[:, [2, 77 + t5]].mean(dim=1))

    embeddings = pipe.encode_prompt("red cat", None, None, max_sequence_length=20)
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    given = dict(zip(names, embeddings, strict=True))
    with seg4diff.capture(pipe, 1, prompt="red cat") as captured:
        pipe(**given, generator=seeded(), **call)
    clip = captured.records[0].maps[0][:, 2].reshape(4, 4)
    torch.testing.assert_close(captured.heatmap("cat", encoder="clip", resize=False), clip)
    with seg4diff.capture(pipe, 1) as captured:
        pipe(**given, generator=seeded(), **call)
    with pytest.raises(RuntimeError, match="prompt="):
        captured.heatmap("cat")


@pytest.mark.parametrize("family", ["sd3", "flux"])
@torch.no_grad()
def test_heatmaps_of_special_tokens(family: str) -> None:
    """Columns counted by hand in the padded token numbers that the text encoders get."""
    pipe = tiny.pipeline(t5=True) if family == "sd3" else tiny.flux_pipeline()
    prompt = "a cat, eos"  # also holds a word of that name
    with seg4diff.capture(pipe, 1) as captured:
        pipe(prompt, generator=seeded(), **{**CALL, "max_sequence_length": 24})
    maps = captured.records[0].maps[0]
    tokenizer, first = (pipe.tokenizer_3, 77) if family == "sd3" else (pipe.tokenizer_2, 0)
    ids = tokenizer(prompt, padding="max_length", max_length=24).input_ids
    end = ids.index(tokenizer.eos_token_id)
    assert ids[end + 1] == ids[-1] == tokenizer.pad_token_id
    columns = {"eos": [first + end], "pad": list(range(first + end + 1, first + 24))}

    def heat(token: Any, **arguments: Any) -> torch.Tensor:
        return captured.heatmap(seg4diff.Special(token), resize=False, **arguments).flatten()

    for token, expected in columns.items():
        assert torch.equal(heat(token, encoder="t5"), maps[:, expected].mean(dim=1))
    with pytest.raises(ValueError, match="no 'bos' token in the text encoders t5"):
        heat("bos", encoder="t5")
    if family == "sd3":
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=77).input_ids
        end = ids.index(pipe.tokenizer.eos_token_id)
        assert set(ids[end:]) == {pipe.tokenizer.eos_token_id}  # CLIP pads with the end of text
        assert torch.equal(heat("bos"), maps[:, 0])
        assert torch.equal(heat("eos"), maps[:, [end, *columns["eos"]]].mean(dim=1))
        assert torch.equal(heat("pad", encoder="clip"), maps[:, end + 1 : 77].mean(dim=1))
    word = captured.columns("eos")
    assert not set(word) & set(captured.columns(seg4diff.Special("eos")))
    with pytest.raises(ValueError, match="'unk'"):
        seg4diff.Special("unk")  # type: ignore[arg-type]


@torch.no_grad()
def test_nested_captures_are_independent() -> None:
    transformer = seg4diff.patch(tiny.transformer())
    inputs = tiny.transformer_inputs()
    with seg4diff.capture(transformer, [0, 1]) as outer:
        with seg4diff.capture(transformer, [1, 2], maps=MapRequest(kind="logit", heads="each")) as inner:
            transformer(**inputs)
        transformer(**inputs)
    assert [(r.layer, r.call) for r in outer.records] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [r.maps.dim() for r in inner.records] == [4, 4]
    torch.testing.assert_close(outer.records[1].maps, outer.records[3].maps)
    query_free = inner.records[0].maps.mean(dim=1)
    assert not torch.allclose(query_free, outer.records[1].maps, rtol=1e-2)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_reach_the_model_through_maps(model: str) -> None:
    """Also with gradient checkpointing, and when backward runs after the context has ended."""
    gradients = []
    for checkpointing, inside in itertools.product((False, True), (False, True)):
        transformer = seg4diff.patch(tiny.transformer(**MODELS[model])).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with seg4diff.capture(transformer, [0, 1], maps=MapRequest(kind="logit")) as captured:
            output = transformer(**tiny.transformer_inputs()).sample
            records = captured.records
            loss = output.square().mean() + sum(r.maps.square().mean() for r in records if r.maps is not None)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert len(records) == len(captured.records) == 2
        names = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj", "pos_embed.proj")
        gradients.append([transformer.get_submodule(name).weight.grad for name in names])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            assert one.abs().max() > 0
            torch.testing.assert_close(two, one)


def test_gradients_when_stopping_early() -> None:
    gradients = []
    for checkpointing, stop in itertools.product((False, True), (False, True)):
        transformer = seg4diff.patch(tiny.transformer(dual=(0, 1), qk_norm="rms_norm")).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with seg4diff.capture(transformer, 1, stop_early=stop) as captured:
            transformer(**tiny.transformer_inputs())
        (1e3 * captured.records[0].maps).square().mean().backward()
        assert transformer.transformer_blocks[2].attn.to_q.weight.grad is None
        gradients.append(transformer.transformer_blocks[0].attn.to_v.weight.grad)
    for other in gradients[1:]:
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(other, gradients[0])


def test_reentrant_checkpointing_is_refused() -> None:
    transformer = seg4diff.patch(tiny.transformer()).train()
    transformer.enable_gradient_checkpointing(
        lambda block, *args: torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=True)
    )
    with seg4diff.capture(transformer, 1), pytest.raises(ValueError, match="use_reentrant=False"):
        transformer(**tiny.transformer_inputs())


@torch.no_grad()
def test_two_threads_on_two_pipelines() -> None:
    pipes = [seg4diff.patch(tiny.pipeline(seed=seed)) for seed in (0, 1)]

    def run(pipe: Any) -> torch.Tensor:
        with seg4diff.capture(pipe, [1, 2]) as captured:
            pipe("a cat", generator=seeded(), **CALL)
        return captured.heatmap("cat")

    def run_often(pipe: Any) -> list[torch.Tensor]:  # one thread a pipeline
        return [run(pipe) for _ in range(3)]

    alone = [run(pipe) for pipe in pipes]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(run_often, pipes))
    for expected, found in zip(alone, together, strict=True):
        for heat in found:
            torch.testing.assert_close(heat, expected)


def test_a_second_thread_on_one_pipeline_is_refused(pipe: Any) -> None:
    image = torch.rand(3, 64, 64)
    with ThreadPoolExecutor(1) as threads:
        with (
            seg4diff.capture(pipe, 1),
            pytest.raises(RuntimeError, match="another thread is using this pipeline"),
        ):
            threads.submit(seg4diff.segment, pipe, image, ["cat"], layers=1).result()
        threads.submit(seg4diff.segment, pipe, image, ["cat"], layers=1).result()  # later it may


@torch.no_grad()
def test_segmentation_inside_a_capture(pipe: Any) -> None:
    """An inner context that stops early leaves the outer one the layers that ran."""
    image = torch.rand(3, 64, 64)
    alone = seg4diff.segment(pipe, image, ["cat", "sofa"], layers=1)
    for stop_early in (False, True):
        with seg4diff.capture(pipe.transformer, [0, 1, 2], stop_early=stop_early) as outer:
            inside = seg4diff.segment(pipe, image, ["cat", "sofa"], layers=1)
        torch.testing.assert_close(inside.scores, alone.scores)
        assert [r.layer for r in outer.records] == ([0, 1, 2] if stop_early else [0, 1])


@torch.no_grad()
def test_memory_is_bounded_by_one_average_a_layer(pipe: Any) -> None:
    with seg4diff.capture(pipe, [0, 1]) as captured:
        pipe("a cat", generator=seeded(), **{**CALL, "num_inference_steps": 6})
        assert len(captured._recorder._sums) == 2
    assert all(not hasattr(block.attn, "seg4diff_attention") for block in pipe.transformer.transformer_blocks)


def test_bad_requests(pipe: Any) -> None:
    stock = pipe.transformer.attn_processors
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "layers 0 to 2", {"layers": 3}),
        (ValueError, "layers 0 to 2", {"layers": [-1]}),
        (ValueError, "is empty", {"layers": []}),
        (TypeError, "integers", {"layers": ["1"]}),
        (ValueError, "nothing to capture", {"maps": None}),
        (ValueError, "accepted: 'mean', 'each', 'last', step numbers", {"steps": "all"}),
        (ValueError, "steps is empty", {"steps": []}),
        (TypeError, "integers, found 0.5", {"steps": [0.5]}),
        (ValueError, "accepted: 'conditional'", {"branch": "none"}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message), seg4diff.capture(pipe, **arguments):
            pass
    with seg4diff.capture(pipe) as captured:
        pass
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        captured.heatmap("cat")
    assert isinstance(captured, Capture)
    with seg4diff.capture(pipe.transformer) as captured, torch.no_grad():
        pipe.transformer(**tiny.transformer_inputs())
    with pytest.raises(RuntimeError, match="capture the pipeline"):
        captured.heatmap("cat")
    with pytest.raises(ValueError, match="no steps"), seg4diff.capture(pipe.transformer, steps="last"):
        pass
    assert pipe.transformer.attn_processors == stock
