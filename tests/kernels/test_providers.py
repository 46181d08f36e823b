"""Kernels of others as backends: a provider made of PyTorch's CPU operator, the table, and the fall-back."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from seg4diff.kernels import api, fallback, measured, providers
from seg4diff.kernels.api import attention_maps, backend, joint_attention, provider_identity
from seg4diff.kernels.aten import backend as aten
from seg4diff.kernels.measured import Row, as_text, ranges_of, read_rows, with_rows
from seg4diff.kernels.testing import (
    assert_accurate,
    attention_inputs,
    exact_attention,
    pytorch_attention,
)
from seg4diff.kernels.types import JointAttention, MapRequest
from tests.support.provider import CALLS, OWN


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    providers.add(OWN)
    yield
    del providers.PROVIDERS["own"], providers.ATTEND["own"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(fallback, "FAILED", {})
    monkeypatch.setattr(measured, "TABLE", {})


UPSTREAM = (("image", "text", "maps"), ("image",), ("text",), ("maps",), ("text", "maps"))
REQUESTS = [
    MapRequest(),
    MapRequest("probability", "each", columns=("text", slice(2, 9))),
    MapRequest("logit", columns=("text", slice(1, 5))),
    MapRequest("text_probability", columns=("text", slice(1, 5))),
    MapRequest(rows=("text", slice(1, 6)), columns=("image", slice(2, 7))),
    MapRequest(rows=("image", torch.tensor([7, 2])), columns=("image", slice(2, 7))),
]


def gradients(
    attend: Callable[..., JointAttention], inputs: dict[str, Tensor], names: tuple[str, ...], **options: Any
) -> tuple[Tensor, ...]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    result = attend(**leaves, **options)
    generator = torch.Generator().manual_seed(3)
    outputs = [getattr(result, name) for name in names]
    sizes = [100.0 if name == "maps" else 1.0 for name in names]
    given = [
        (size * torch.randn(o.shape, generator=generator)).to(inputs["query"].dtype).to(o.dtype)
        for size, o in zip(sizes, outputs, strict=True)
    ]
    return torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: f"{r.kind}-{r.heads}-{r.rows[0]}-{r.columns[0]}")
def test_a_provider_equals_the_reference(request_: MapRequest, edited: bool) -> None:
    """Output, log-sum-exp, map, statistics and all gradients, in float64."""
    inputs = attention_inputs(2, 23, 11, 3, 16, torch.float64, edited=edited)
    options: dict[str, Any] = {"maps": request_, "statistics": True, "scale": 0.4}
    exact = exact_attention(**inputs, **options)
    with backend("own"):
        found = joint_attention(**inputs, **options)
    assert ["forward"] * (2 if edited else 1) == CALLS
    for part in ("image", "text", "lse", "maps"):
        torch.testing.assert_close(getattr(found, part), getattr(exact, part), msg=part)
    for part, mass in vars(found.statistics).items():
        torch.testing.assert_close(mass, getattr(exact.statistics, part), msg=part)
    for names in UPSTREAM:
        true = gradients(exact_attention, inputs, names, **options)
        CALLS.clear()
        with backend("own"):
            actual = gradients(joint_attention, inputs, names, **options)
        assert "backward" in CALLS or names == ("maps",)
        for name, one, other in zip(inputs, actual, true, strict=True):
            torch.testing.assert_close(one, other, msg=f"d_{name} of {names}")


@pytest.mark.parametrize("head_dim", [64, 72])  # above 64 with a map, the backward is ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_keep_the_error_budget(dtype: torch.dtype, head_dim: int) -> None:
    inputs = attention_inputs(1, 70, 33, 2, head_dim, dtype)
    names, options = ("image", "text", "maps"), {"maps": MapRequest()}
    with backend("own"):
        found = gradients(joint_attention, inputs, names, **options)
    assert ["forward", "backward"][: 1 if head_dim > 64 else 2] == CALLS
    exact = gradients(exact_attention, {n: t.double() for n, t in inputs.items()}, names, **options)
    usual = gradients(pytorch_attention, inputs, names, **options)
    for name, *three in zip(inputs, found, exact, usual, strict=True):
        assert_accurate(*three, name=f"d_{name}")


def test_image_rows_alone_and_maps_alone() -> None:
    inputs = {**attention_inputs(1, 9, 5, 2, 8, torch.float64), "text_query": None}
    streams = [inputs[name] for name in ("query", "key", "text_query", "text_key")]
    exact = exact_attention(**inputs, maps=MapRequest())
    with backend("own"):
        found = joint_attention(**inputs, maps=MapRequest())
        assert CALLS == ["forward"]
        alone = attention_maps(*streams)  # type: ignore[arg-type]
    assert CALLS == ["forward"]  # there is no attention to compute
    torch.testing.assert_close(found.image, exact.image)
    torch.testing.assert_close(found.maps, exact.maps)
    torch.testing.assert_close(alone.maps, exact.maps)
    assert found.text.shape[1] == 0


def test_what_a_provider_refuses_names_what_can() -> None:
    inputs = attention_inputs(1, 4, 3, 1, 8, torch.float32)
    remedy = r'; backend\("aten"\) can'
    with backend("own"):
        with pytest.raises(ValueError, match=r'backend\("own"\) cannot run this: a text bias .*' + remedy):
            joint_attention(**inputs, text_bias=torch.zeros(1, 3))
        with pytest.raises(ValueError, match="without image keys .*" + remedy):
            joint_attention(**{**inputs, "key": None, "value": None})
        with pytest.raises(ValueError, match="head dim 12 is refused" + remedy):
            joint_attention(**attention_inputs(1, 4, 3, 1, 12, torch.float32))
    with backend("flash-attn-3"), pytest.raises(ValueError, match="flash_attn_interface is not installed"):
        joint_attention(**inputs)
    for name in ("cudnn", "flash"):
        with backend(name), pytest.raises(ValueError, match="device cpu is not an NVIDIA GPU"):
            joint_attention(**inputs)
    unknown = pytest.raises(ValueError, match="'flash-attn-9' is unknown; accepted: auto, .*flash-attn-4")
    with unknown, backend("flash-attn-9"):
        pass


def test_calls_of_pytorchs_operators_fit_their_schemas() -> None:
    """Shapes without numbers, where no GPU is."""
    query, key = torch.empty(2, 50, 3, 64, device="meta"), torch.empty(2, 70, 3, 64, device="meta")
    for name in ("cudnn", "flash"):
        provider = providers.PROVIDERS[name]
        out, lse = provider.forward(query, key, key, 0.125)
        assert (out.shape, lse.shape) == (query.shape, (2, 3, 50))
        for row_sum in (None, lse):
            given = (out, query, key, key, out, lse, row_sum, 0.125)
            found = provider.backward(*given)
            assert [gradient.shape for gradient in found] == [query.shape, key.shape, key.shape]


# The table


def row(tokens: int, forward: str = "own", training: str = "triton", **changes: Any) -> Row:
    given = {"architecture": "sm_90", "head_dim": 16, "evidence": {}, **changes}
    return Row(tokens=tokens, forward=forward, training=training, **given)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "architecture", lambda device: "sm_90")


def test_a_measured_provider_serves_the_shapes_near_it(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(100), row(400, "flash", "cudnn"), row(100, "x", "y", head_dim=32)]
    monkeypatch.setattr(measured, "TABLE", ranges_of(rows))
    device = torch.device("cpu")
    found = {tokens: measured.fastest(device, 16, tokens, False) for tokens in (49, 50, 199, 201, 800, 801)}
    assert found == {49: None, 50: "own", 199: "own", 201: "flash", 800: "flash", 801: None}
    assert measured.fastest(device, 16, 400, True) == "cudnn"
    assert measured.fastest(device, 32, 100, True) == "y"
    assert measured.fastest(device, 64, 100, True) is None
    monkeypatch.setattr(measured, "architecture", lambda device: "sm_80")
    assert measured.fastest(device, 16, 100, False) is None


def test_the_table_chooses_under_auto(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention_inputs(1, 70, 20, 2, 16, torch.float32)
    learned = {**inputs, "query": inputs["query"].clone().requires_grad_()}
    joint_attention(**inputs)
    assert CALLS == [], "nothing is measured"
    monkeypatch.setattr(measured, "TABLE", ranges_of([row(90, "own", "triton")]))
    joint_attention(**inputs)
    assert CALLS == ["forward"]
    joint_attention(**learned)
    assert CALLS == ["forward"], "another is faster with gradients"
    with torch.no_grad():
        joint_attention(**learned)
    with backend("aten"):
        joint_attention(**inputs)
    joint_attention(**inputs, text_bias=torch.zeros(1, 20))  # refused, so the usual choice
    assert CALLS == ["forward"] * 2
    expected = joint_attention(**inputs).image
    for name in ("flash-attn-2", "aten", "triton", "a later version's"):
        monkeypatch.setattr(measured, "TABLE", ranges_of([row(90, name)]))
        with monkeypatch.context() as patch:
            patch.setattr(api.reference, "attend", None)
            torch.testing.assert_close(joint_attention(**inputs).image, expected, msg=name)
    assert CALLS == ["forward"] * 3


def test_the_identity_of_a_run_names_what_the_table_changes(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provider_identity("cpu") is None
    monkeypatch.setattr(measured, "TABLE", ranges_of([row(90, "triton", "triton")]))
    assert provider_identity("cpu") is None
    monkeypatch.setattr(
        measured, "TABLE", ranges_of([row(90, "own", "triton"), row(9, architecture="sm_80")])
    )
    assert provider_identity("cpu") == "head dim 16, 45 to 180 tokens: own, training triton"
    with backend("aten"):
        assert provider_identity("cpu") == "aten"


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    assert read_rows(path) == ()
    rows = with_rows([row(90), row(50)], [row(90, "flash"), row(70, head_dim=8)])
    assert [(r.head_dim, r.tokens, r.forward) for r in rows] == [
        (8, 70, "own"),
        (16, 50, "own"),
        (16, 90, "flash"),
    ]
    path.write_text(as_text(rows))
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    "damage",
    ["", "[]", '{"version": 2, "rows": []}', '{"version": 1}', '{"version": 1, "rows": [{"tokens": 4}]}',
     as_text([row(90)]).replace("90", "-90"), as_text([row(90)]).replace('"own"', "7"),
     as_text([row(90)])[:-9], "\x00"],
)  # fmt: skip
def test_a_damaged_table_is_a_warning(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.user_table().parent.mkdir()
    measured.user_table().write_text(damage)
    with pytest.raises(ValueError, match="is not a table of measured attention"):
        read_rows(measured.user_table())
    assert measured._load() == measured.COMMITTED
    assert len(caplog.messages) == 1
    assert "measurements of attention are ignored" in caplog.text
    assert "seg4diff kernels tune" in caplog.text


def test_the_committed_table_names_providers() -> None:
    names = {"triton", *providers.PROVIDERS} - {"own"}
    assert all({r.forward, r.training} <= names for r in measured.COMMITTED)


# The fall-back


def triton_errors() -> list[Exception]:
    triton = pytest.importorskip("triton", reason="needs Triton")
    return [
        triton.runtime.errors.OutOfResources(232448, 101376, "shared memory"),
        triton.runtime.errors.PTXASError("ptxas fatal"),
        triton.compiler.errors.CompilationError(None, None, "a dot of nothing"),
        RuntimeError("PassManager::run failed"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc"]),
    ]


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        CALLS.append("failed")
        raise error

    return fail


@pytest.fixture
def table_names(monkeypatch: pytest.MonkeyPatch, on_hopper: None) -> Iterator[Callable[..., str]]:
    """Registers the provider with other functions; the table then chooses it for 34 tokens."""
    names: list[str] = []

    def register(**functions: Any) -> str:
        names.append(f"own-{len(USED)}")
        USED.append(names[-1])
        providers.add(replace(OWN, name=names[-1], **functions))
        monkeypatch.setattr(measured, "TABLE", ranges_of([row(34, names[-1], names[-1])]))
        return names[-1]

    yield register
    for name in names:
        del providers.PROVIDERS[name], providers.ATTEND[name]


USED: list[str] = []  # an operator's name can be registered once


@pytest.mark.parametrize("index", range(6))
def test_what_cannot_be_built_is_replaced_once_and_for_all(
    index: int, table_names: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    error = triton_errors()[index]
    name = table_names(forward=failing(error))
    inputs = attention_inputs(1, 23, 11, 3, 16, torch.float32)
    expected = aten.attend(
        providers.Inputs(**inputs, text_value_for_image=None), 0.25, MapRequest(), False, None
    )
    for _ in range(3):
        found = joint_attention(**inputs, maps=MapRequest())
        assert torch.equal(found.image, expected.image)  # type: ignore[union-attr]
        assert torch.equal(found.maps, expected.maps)
    assert CALLS == ["failed"], "it is tried once"
    assert len(caplog.messages) == 1
    for part in (name, "forward", "head dim 16", type(error).__name__, "raises the error"):
        assert part in caplog.text
    joint_attention(**attention_inputs(1, 23, 11, 3, 16, torch.float64), maps=MapRequest())
    assert CALLS == ["failed"] * 2, "of another dtype nothing is known"
    CALLS.clear()
    with backend(name), pytest.raises(type(error)):
        joint_attention(**inputs)
    assert CALLS == ["failed"], "what is forced is not replaced"


def test_a_backward_that_cannot_be_built(
    table_names: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    table_names(backward=failing(triton_errors()[0]))
    inputs = attention_inputs(1, 23, 11, 3, 16, torch.float64)
    names, options = ("image", "text", "maps"), {"maps": MapRequest()}
    for _ in range(2):
        found = gradients(joint_attention, inputs, names, **options)
        for one, other in zip(found, gradients(exact_attention, inputs, names, **options), strict=True):
            torch.testing.assert_close(one, other)
    assert CALLS == ["forward", "failed", "forward"]
    assert len(caplog.messages) == 1
    assert "backward" in caplog.text


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered"),
     torch.OutOfMemoryError("CUDA out of memory"), ValueError("a bug"),
     RuntimeError("Triton Error [CUDA]: misaligned address")],
    ids=str,
)  # fmt: skip
def test_other_errors_are_raised(
    error: Exception, table_names: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    table_names(forward=failing(error))
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)[:20].replace("[", ".")):
            joint_attention(**attention_inputs(1, 23, 11, 3, 16, torch.float32))
    assert CALLS == ["failed"] * 2
    assert not caplog.messages


def test_compiles_as_one_graph_and_falls_back_inside(
    table_names: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = attention_inputs(1, 23, 11, 3, 16, torch.float64)

    def model(query: Tensor) -> Tensor:
        result = joint_attention(**{**inputs, "query": query}, maps=MapRequest(), statistics=True)
        return result.image.sum() + 50 * result.maps.square().sum() + result.text.square().sum()

    def loss_and_gradient(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        query = inputs["query"].clone().requires_grad_()
        loss = run(query)
        return loss.detach(), torch.autograd.grad(loss, query)[0]

    with backend("reference"):
        expected = loss_and_gradient(model)
    for functions, calls in (
        ({}, ["forward", "backward"]),
        ({"forward": failing(triton_errors()[0])}, ["failed"]),
    ):
        torch.compiler.reset()
        table_names(**functions)
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        CALLS.clear()
        torch.testing.assert_close(loss_and_gradient(compiled), expected)
        assert CALLS[: len(calls)] == calls
        assert counter.frame_count == 1
