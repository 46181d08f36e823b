"""Attention mass and norms against hooks and a float64 softmax; what counts; the report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import seg4diff
from seg4diff.analysis import AnalysisReport, analyze
from seg4diff.analysis.pca import principal_components
from seg4diff.kernels.testing import assert_accurate, error_ratio
from tests.support import tiny
from tests.support.hooked import hooked_projections
from tests.support.images import random_image, size_of

MODELS = {"sd3": {}, "sd3.5": {"dual": (0,), "qk_norm": "rms_norm"}}


def by_softmax(projections: dict[str, Tensor], rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """Measures of one layer from its projections [B, tokens, H, D]: over ``rows``, of every head."""
    p = {name: tensor[rows].to(dtype) for name, tensor in projections.items()}
    tokens = p["to_q"].shape[1]
    query = torch.cat([p["to_q"], p["add_q_proj"]], dim=1)
    key = torch.cat([p["to_k"], p["add_k_proj"]], dim=1)
    attention = (torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5).softmax(dim=-1)
    to_text = attention[..., tokens:].sum(dim=-1)  # [B, H, S]
    return {
        "image_to_text": to_text[..., :tokens].mean(dim=(0, 2)),
        "text_to_text": to_text[..., tokens:].mean(dim=(0, 2)),
        "image_value_norm": p["to_v"].norm(dim=-1).mean(dim=(0, 1)),
        "text_value_norm": p["add_v_proj"].norm(dim=-1).mean(dim=(0, 1)),
        "whole_image_value_norm": p["to_v"].flatten(2).norm(dim=-1).mean(),
        "whole_text_value_norm": p["add_v_proj"].flatten(2).norm(dim=-1).mean(),
        "text_norms": p["add_v_proj"].flatten(2).norm(dim=-1),  # [B, T]
    }


def check_measures(
    report: AnalysisReport, level: int, layers: dict[int, dict[str, Tensor]], rows: slice
) -> None:
    """A level of a report against the float64 answer, to the error budget; and against wrong answers.

    ``layers`` holds the projections of every layer of the report, in its order.
    """
    exact, baseline = (
        [by_softmax(projections, rows, dtype) for projections in layers.values()]
        for dtype in (torch.float64, torch.float32)
    )
    assert report.by_head is not None
    for name in ("image_to_text", "text_to_text", "image_value_norm", "text_value_norm"):
        whole = f"whole_{name}" if name.endswith("norm") else name
        for measures, key in ((report.by_head, name), (report.by_layer, whole)):
            ours = getattr(measures, name)[level]
            wanted, plain = (torch.stack([found[key] for found in several]) for several in (exact, baseline))
            if key == name and measures is report.by_layer:
                wanted, plain = wanted.mean(dim=1), plain.mean(dim=1)
            assert_accurate(ours.float(), wanted, plain, name=name)
            for wrong in (ours.roll(1, dims=0), ours.flip(-1), ours * 0, 1 - ours):  # layer, head, ...
                assert error_ratio(wrong.float(), wanted, plain) > 1


@pytest.mark.parametrize("model", MODELS)
def test_given_images_equal_hooks_in_float64(model: str) -> None:
    pipe = seg4diff.patch(tiny.pipeline(**MODELS[model]))
    images = [random_image(seed=1), random_image(seed=2)]
    with hooked_projections(pipe.transformer) as projections:
        report = analyze(
            pipe,
            ["a cat", "a red sofa"],
            images=images,
            noise_levels=[3],
            steps=5,
            per_head=True,
            batch_size=2,
        )
    assert report.layers == (0, 1, 2)
    assert report.images == 2
    check_measures(report, 0, projections, slice(None))
    assert not torch.allclose(
        report.by_layer.image_to_text[0, 0], report.by_layer.image_to_text[0, 1], rtol=1e-4
    )
    assert report.uniform_to_text == pytest.approx(154 / (154 + 16))
    assert report.grid == (4, 4)
    # the prompt's own tokens: "a cat" is 2 of 77, "a red sofa" 3, behind the begin token
    norms = by_softmax(projections[1], slice(None), torch.float64)["text_norms"]
    expected = (norms[0, 1:3].mean() + norms[1, 1:4].mean()) / 2
    assert float(report.by_layer.prompt_value_norm[0, 1]) == pytest.approx(float(expected), rel=1e-5)
    ratio = expected / report.by_layer.image_value_norm[0, 1]
    assert float(report.by_layer.value_norm_ratio[0, 1]) == pytest.approx(float(ratio), rel=1e-5)


@pytest.mark.parametrize("listed", [50, 2])
def test_sinks_equal_hooks_in_float64(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of token, summed over its columns, from the materialised softmax; in total, I2T."""
    monkeypatch.setattr("seg4diff.analysis.sinks.WORDS_LISTED", listed)
    pipe = seg4diff.patch(tiny.pipeline(t5=True))
    prompts = ["a cat, red", "a dog"]
    with hooked_projections(pipe.transformer) as projections:
        report = analyze(
            pipe, prompts, images=[random_image(seed=1), random_image(seed=2)], noise_levels=[3], steps=5,
            batch_size=2,
        )  # fmt: skip
    for position, found in enumerate(projections.values()):
        query = torch.cat([found["to_q"], found["add_q_proj"]], dim=1).double()
        key = torch.cat([found["to_k"], found["add_k_proj"]], dim=1).double()
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        image = found["to_q"].shape[1]
        shares = scores.softmax(dim=-1)[:, :, :image, image:].mean(dim=(1, 2))  # [B, T]
        cut = [len(pipe.tokenizer(prompt).input_ids) for prompt in prompts]
        clip = shares[:, :77]
        expected = {
            "clip <bos>": clip[:, 0].mean(),
            "clip <eos>": (clip[0, cut[0] - 1] + clip[1, cut[1] - 1]) / 2,
            "clip <pad>": (clip[0, cut[0] :].sum() + clip[1, cut[1] :].sum()) / 2,
            "clip cat": clip[0, 2] / 2,
            "clip ,": clip[0, 3] / 2,
            "clip dog": clip[1, 2] / 2,
            "clip a": clip[:, 1].mean(),
        }
        assert ("other words" in report.sinks) == (listed == 2)
        assert sum("<" not in token for token in report.sinks) == (3 if listed == 2 else 10)
        for token, share in expected.items():
            if listed == 2 and "<" not in token:
                continue
            ours = float(report.sinks[token][0, position])
            assert ours == pytest.approx(float(share), rel=1e-4), token
        t5 = [shares[row, 77 + len(pipe.tokenizer_3(p).input_ids) :].sum() for row, p in enumerate(prompts)]
        assert float(report.sinks["t5 <pad>"][0, position]) == pytest.approx(float(sum(t5) / 2), rel=1e-4)
    total = torch.stack(list(report.sinks.values())).sum(dim=0)
    torch.testing.assert_close(total, report.by_layer.image_to_text, rtol=1e-5, atol=0)
    means = [float(shares.mean()) for name, shares in report.sinks.items() if name != "other words"]
    assert means == sorted(means, reverse=True)


def test_columns_without_an_encoder_are_named(pipe: Any) -> None:
    report = analyze(pipe, "a cat", images=[random_image()], noise_levels=[2], steps=3)
    assert "<without encoder>" in report.sinks  # the slot of the encoder that was left out
    total = torch.stack(list(report.sinks.values())).sum(dim=0)
    torch.testing.assert_close(total, report.by_layer.image_to_text, rtol=1e-5, atol=0)


def test_demo_model_equals_hooks_in_float64() -> None:
    """Trained attention is far from uniform: layers and heads differ by orders of magnitude."""
    from seg4diff.demo import HELD_OUT, scene
    from seg4diff.loading import load_pipeline

    pipe = seg4diff.patch(load_pipeline("demo", "cpu"))
    drawn = scene(HELD_OUT)
    with hooked_projections(pipe.transformer) as projections:
        report = analyze(pipe, drawn.caption, images=drawn.image, noise_levels=[8], per_head=True)
    check_measures(report, 0, projections, slice(None))


def test_drawing_measures_the_conditional_half_at_its_steps(pipe: Any) -> None:
    """Steps left count from the end; each step is compared with hooks on the same pipeline call."""
    seen: list[dict[int, dict[str, Tensor]]] = []
    with hooked_projections(pipe.transformer) as projections:

        def keep(*_: Any) -> dict[str, Any]:
            seen.append({layer: dict(found) for layer, found in projections.items()})
            return {}

        report = analyze(
            pipe, ["a cat", "a dog"], noise_levels=[1, 4], steps=4, per_head=True, batch_size=2,
            layers=[0, 2], guidance_scale=3.0, callback_on_step_end=keep,
        )  # fmt: skip
    assert report.noise_levels == (1, 4)
    assert report.timesteps[1] == pytest.approx(1000.0)
    assert report.timesteps[0] < report.timesteps[1]
    assert len(seen) == 4
    for level, step in ((0, 3), (1, 0)):
        check_measures(report, level, {layer: seen[step][layer] for layer in (0, 2)}, slice(2, 4))
    unconditional = by_softmax(seen[0][2], slice(0, 2), torch.float64)["image_to_text"].mean()
    assert abs(float(report.by_layer.image_to_text[1, 1] - unconditional)) > 1e-6


def test_images_are_averaged_whatever_the_batches(pipe: Any) -> None:
    prompts = ["a cat", "a dog on a sofa", ""]
    together = analyze(pipe, prompts, noise_levels=[2], steps=2, batch_size=3, per_head=True)
    one_by_one = analyze(pipe, prompts, noise_levels=[2], steps=2, batch_size=1, per_head=True)
    for name in ("image_to_text", "text_to_text", "image_value_norm", "prompt_value_norm"):
        torch.testing.assert_close(
            getattr(together.by_layer, name), getattr(one_by_one.by_layer, name), rtol=1e-4, atol=0
        )
    first = analyze(pipe, prompts[0], noise_levels=[2], steps=2)
    other = analyze(pipe, prompts[0], noise_levels=[2], steps=2, seed=5)
    assert not torch.equal(first.by_layer.image_to_text, other.by_layer.image_to_text)
    assert first.by_head is None


def test_images_of_several_sizes_and_no_prompt(pipe: Any) -> None:
    report = analyze(pipe, images=[random_image(64, 64), random_image(32, 128)], noise_levels=[1, 2], steps=3)
    assert report.images == 2
    assert report.by_layer.prompt_value_norm.isnan().all()
    assert report.by_layer.value_norm_ratio.isfinite().all()
    assert report.by_layer.image_to_text.shape == (2, 3)


def test_projections_are_of_the_first_image(pipe: Any) -> None:
    options: dict[str, Any] = {"noise_levels": [2], "steps": 3, "projections": True}
    with hooked_projections(pipe.transformer) as projections:
        report = analyze(pipe, "a cat", images=[random_image(seed=4)], **options)
    expected = {
        (name, layer): principal_components(projections[layer][key][0].flatten(1))
        for name, key in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"))
        for layer in range(3)
    }
    for (name, layer), scores in expected.items():
        found = report.projections[name][0, layer]
        assert found.shape == (16, 3)
        torch.testing.assert_close(found, scores, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(expected["query", 0], expected["key", 0], rtol=0.1)
    shown = report.projection("value", 2)
    assert shown.shape == (4, 4, 3)
    assert shown.amin() == 0
    assert shown.amax() == 1
    images = [random_image(seed=4), random_image(seed=5)]
    two = analyze(pipe, "a cat", images=images, batch_size=2, **options)
    torch.testing.assert_close(two.projections["key"], report.projections["key"], rtol=1e-3, atol=1e-5)


def test_nothing_is_left_behind(pipe: Any) -> None:
    processors = dict(pipe.transformer.attn_processors)
    analyze(pipe, "a cat", noise_levels=[1], steps=2, projections=True)

    def fails(*_: Any) -> Any:
        raise RuntimeError("a callback")

    with pytest.raises(RuntimeError, match="a callback"):
        analyze(pipe, "a cat", noise_levels=[1], steps=2, callback_on_step_end=fails)
    assert pipe.transformer.attn_processors == processors
    assert "encode_prompt" not in vars(pipe)
    assert not pipe.transformer._forward_hooks
    assert pipe._progress_bar_config == {"disable": True}
    for block in pipe.transformer.transformer_blocks:
        assert not hasattr(block.attn, "seg4diff_attention")


def test_perturbation_around_an_analysis_is_felt(pipe: Any) -> None:
    arguments: dict[str, Any] = {"images": [random_image()], "noise_levels": [2], "steps": 3}
    plain = analyze(pipe, "a cat", **arguments).by_layer
    with seg4diff.perturb(pipe, 0):
        perturbed = analyze(pipe, "a cat", **arguments).by_layer
    torch.testing.assert_close(perturbed.image_to_text[:, 0], plain.image_to_text[:, 0])
    assert not torch.allclose(perturbed.image_to_text[:, 1:], plain.image_to_text[:, 1:], rtol=1e-6)
    torch.testing.assert_close(perturbed.text_value_norm[:, 0], plain.text_value_norm[:, 0])


@pytest.fixture(scope="module")
def report(pipe: Any) -> AnalysisReport:
    return analyze(
        pipe,
        ["a cat"],
        images=[random_image()],
        noise_levels=[1, 3],
        steps=3,
        per_head=True,
        projections=True,
    )


def test_report_survives_saving(report: AnalysisReport, tmp_path: Path) -> None:
    paths = report.save(tmp_path / "folder" / "report.json")
    assert [path.name for path in paths] == ["report.safetensors", "report.json"]
    for given in ("report", "report.json", "report.safetensors"):
        loaded = AnalysisReport.load(tmp_path / "folder" / given)
        assert loaded.layers == report.layers
        assert loaded.noise_levels == report.noise_levels
        assert loaded.timesteps == report.timesteps
        assert loaded.uniform_to_text == report.uniform_to_text
        assert loaded.grid == report.grid
        assert loaded.metadata["prompts"] == ["a cat"]
        assert list(loaded.sinks) == list(report.sinks)
        assert all(torch.equal(shares, report.sinks[name]) for name, shares in loaded.sinks.items())
        assert loaded.by_head is not None
        assert report.by_head is not None
        for mine, other in ((loaded.by_layer, report.by_layer), (loaded.by_head, report.by_head)):
            assert torch.equal(mine.image_to_text, other.image_to_text)
            assert torch.equal(mine.prompt_value_norm, other.prompt_value_norm)
        assert torch.equal(loaded.projections["key"], report.projections["key"])


def test_damaged_reports_are_named(report: AnalysisReport, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        AnalysisReport.load(tmp_path / "nowhere")
    tensors, description = report.save(tmp_path / "report")
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        AnalysisReport.load(tmp_path / "report")
    report.save(tmp_path / "report")
    description.write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="format is 'another'"):
        AnalysisReport.load(tmp_path / "report")


def test_table_holds_the_numbers(report: AnalysisReport) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table(noise_level=3))
    text = console.export_text()
    assert "3 steps left (timestep 1000.0), 1 image" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["2"])
    cells = [float(cell) for cell in row.split()]
    measures = report.by_layer
    assert cells[1] == pytest.approx(100 * float(measures.image_to_image[1, 2]), abs=0.01)
    assert cells[2] == pytest.approx(100 * float(measures.image_to_text[1, 2]), abs=0.01)
    assert cells[5] == pytest.approx(100 * float(measures.text_to_text[1, 2]), abs=0.01)
    assert cells[9] == pytest.approx(float(measures.value_norm_ratio[1, 2]), rel=0.01)
    console.print(report.sink_table(noise_level=3))
    row = next(line for line in console.export_text().splitlines() if line.strip().startswith("clip <bos>"))
    shares = report.sinks["clip <bos>"][1]
    mean, most, layer = (float(cell) for cell in row.split()[2:])
    assert mean == pytest.approx(100 * float(shares.mean()), abs=0.01)
    assert most == pytest.approx(100 * float(shares.max()), abs=0.01)
    assert layer == report.layers[int(shares.argmax())]


def test_a_report_of_the_format_before_is_read(report: AnalysisReport, tmp_path: Path) -> None:
    _, description = report.save(tmp_path / "report")
    content = json.loads(description.read_text())
    del content["sinks"]
    description.write_text(json.dumps({**content, "format": "seg4diff analysis 2"}))
    loaded = AnalysisReport.load(tmp_path / "report")
    assert loaded.sinks == {}
    assert torch.equal(loaded.by_layer.image_to_text, report.by_layer.image_to_text)


@pytest.mark.extra("viz", "matplotlib")
def test_figures_show_every_layer(report: AnalysisReport, tmp_path: Path) -> None:
    from seg4diff.analysis.plots import save_figures

    figures = {
        "attention mass": report.plot_attention_mass(),
        "norms": report.plot_value_norms(noise_level=3),
        "projections": report.plot_projections(),
    }
    bars = figures["attention mass"].axes[0].patches
    assert [bar.get_height() for bar in bars[:3]] == report.by_layer.image_to_image[0].tolist()
    lines = figures["norms"].axes[0].lines
    assert list(lines[1].get_ydata()) == report.by_layer.text_value_norm[1].tolist()
    assert sum(len(axes.images) for axes in figures["projections"].axes) == 9
    for path in save_figures(figures, tmp_path / "figures"):
        assert size_of(path)[0] > 300


def test_matplotlib_is_asked_for_when_it_is_missing(
    report: AnalysisReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"seg4diff\[viz\]"):
        report.plot_attention_mass()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither prompts nor images"),
        ({"prompts": []}, "prompts is empty"),
        ({"images": []}, "images is empty"),
        ({"prompts": "a cat", "layers": 3}, "layer 3 is out of range"),
        ({"prompts": "a cat", "noise_levels": [0]}, "noise level 0 is out of range: 1 to 28"),
        ({"prompts": "a cat", "noise_levels": [29]}, "noise level 29"),
        ({"prompts": "a cat", "noise_levels": []}, "noise_levels=\\[\\]"),
        ({"prompts": "a cat", "noise_levels": [1, 1]}, "each once"),
        ({"prompts": "a cat", "steps": 0}, "steps=0"),
        ({"prompts": "a cat", "batch_size": 0}, "batch_size=0"),
        ({"prompts": ["a", "b"], "images": [random_image()] * 3}, "2 prompts for 3 images"),
        ({"images": [random_image()], "preset": "beast"}, "'beast'"),
        ({"images": [random_image()], "negative_prompt": "x"}, "'negative_prompt': only for drawing"),
    ],
)
def test_bad_requests_are_named(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyze(pipe, **arguments)
    assert analyze(pipe, images=[random_image()], noise_levels=[1], steps=1).images == 1


def test_what_cannot_be_analysed(pipe: Any) -> None:
    with pytest.raises(TypeError, match="no VAE"):
        analyze(pipe.transformer, "a cat")


def test_questions_the_report_cannot_answer(report: AnalysisReport) -> None:
    with pytest.raises(ValueError, match=r"noise level 2 is not in the report; it holds \[1, 3\]"):
        report.table(noise_level=2)
    with pytest.raises(ValueError, match="'values' is not in the report; it holds: 'query', 'key', 'value'"):
        report.projection("values", 1)
    with pytest.raises(ValueError, match="layer 7"):
        report.projection("value", 7)
