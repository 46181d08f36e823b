"""The Triton kernels on the CPU, under Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from triton.runtime.errors import OutOfResources

from seg4diff.kernels import api, fallback, providers
from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.testing import (
    assert_accurate,
    attention_inputs,
    exact_attention,
    exact_maps,
    pytorch_attention,
    pytorch_maps,
)
from seg4diff.kernels.triton import backend as triton_backend
from seg4diff.kernels.triton import forward, launch, maps, tuning
from seg4diff.kernels.types import STREAMS, AttentionMaps, JointAttention, MapRequest
from tests.support.addresses import watched
from tests.support.interpreter import repair_arithmetic
from tests.support.provider import OWN

repair_arithmetic()
providers.add(OWN)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    with backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every uninitialised tensor with NaN: what a kernel forgets to write then shows.

    Not in tests of torch.compile, which does not trace through the stand-ins.
    """
    if "compile" in request.node.name:
        return

    def fill(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def created(*args: Any, **options: Any) -> Tensor:
            tensor = create(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return created

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))


def test_poison_reaches_the_host_code() -> None:
    assert torch.ones(3).new_empty(2).isnan().all()


@dataclasses.dataclass(frozen=True)
class Case:
    """One joint attention: image tokens, text tokens, heads, head dim, and what is asked of it."""

    tokens: int
    text_tokens: int
    heads: int
    head_dim: int
    dtype: str
    kind: str = "probability"
    reduction: str = "mean"
    batch: int = 1
    text: tuple[int, int] | None = None
    edited: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        words = [f"N{self.tokens}", f"T{self.text_tokens}", f"H{self.heads}", f"D{self.head_dim}", self.dtype]
        words += [self.kind, self.reduction]
        words += [f"B{self.batch}"] if self.batch > 1 else []
        words += ["edited"] if self.edited else []
        words += ["slice"] if self.text else []
        words += [f"scale{self.scale}"] if self.scale is not None else []
        return "-".join(words)

    @property
    def maps(self) -> MapRequest:
        return MapRequest(self.kind, self.reduction, columns=("text", slice(*self.text or (None,))))  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Tensor]:
        return attention_inputs(
            self.batch,
            self.tokens,
            self.text_tokens,
            self.heads,
            self.head_dim,
            DTYPES[self.dtype],
            edited=self.edited,
        )


# A pairwise cover: every two of (image tokens, text tokens, head dim, dtype, kind, reduction) meet somewhere.
# 70 tokens are two tiles of rows and three of columns, the last of either nearly empty; 64 fill their tiles.
FORWARD = [
    Case(1, 33, 2, 64, "bf16", "probability", "mean"),
    Case(70, 77, 3, 32, "fp16", "logit", "each"),
    Case(64, 1, 2, 96, "fp32", "probability", "each", batch=2),
    Case(70, 33, 2, 64, "fp16", "text_probability", "mean", edited=True, text=(3, 30)),
    Case(70, 77, 1, 16, "bf16", "text_probability", "mean"),
    Case(64, 33, 2, 40, "fp32", "logit", "each", text=(20, 33)),
    Case(64, 77, 2, 128, "bf16", "logit", "mean", batch=2),
    Case(70, 33, 2, 256, "fp32", "text_probability", "each"),
    Case(70, 77, 3, 96, "bf16", "probability", "each", text=(1, 2)),
    Case(70, 1, 2, 32, "fp32", "logit", "mean", edited=True),
    Case(1, 77, 3, 128, "fp32", "probability", "mean", scale=0.1),
    Case(70, 1, 1, 64, "fp16", "probability", "each", batch=2, edited=True),
    Case(64, 33, 2, 16, "fp16", "probability", "mean", scale=0.3),
    Case(33, 129, 1, 48, "fp16", "text_probability", "each"),
    Case(70, 1, 2, 128, "bf16", "logit", "mean", scale=0.05),
    Case(131, 33, 2, 72, "bf16", "probability", "each", edited=True),
]


def judge(case: Case, actual: JointAttention, exact: JointAttention, baseline: JointAttention) -> None:
    for name in ("image", "text", "maps"):
        results = [getattr(result, name) for result in (actual, exact, baseline)]
        assert_accurate(*results, name=f"{name} of {case}")


def sample(cases: Sequence[Any], every: int = 4) -> list[Any]:
    """All cases; those between every fourth, or ``every``, are marked slow."""
    arguments = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*given, marks=pytest.mark.slow if index % every else [])
        for index, given in enumerate(arguments)
    ]


@pytest.mark.parametrize("case", sample(FORWARD), ids=str)
def test_forward(case: Case) -> None:
    inputs = case.inputs()
    options: dict[str, Any] = {"maps": case.maps, "scale": case.scale, "statistics": True}
    actual = joint_attention(**inputs, **options)
    exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
    judge(case, actual, exact, baseline)
    # Rows of both streams together: the greatest error of a handful of numbers is a matter of luck.
    for names in (("image_to_text", "text_to_text"), ("image_value_norm", "text_value_norm")):
        results = [
            torch.cat([getattr(result.statistics, name) for name in names], dim=-1)
            for result in (actual, exact, baseline)
        ]
        assert_accurate(*results, name=f"{names} of {case}")
    assert_accurate(actual.lse, exact.lse, baseline.lse, name=f"lse of {case}")


@pytest.mark.parametrize(
    ("kind", "statistics"), [("probability", False), ("logit", True), ("text_probability", False)]
)
def test_maps_alone(kind: str, statistics: bool) -> None:
    """Without values there is no output, and only the log-sum-exp that is needed."""
    case = Case(70, 33, 3, 64, "bf16", kind, "mean", batch=2, text=(5, 30))
    inputs = {name: tensor for name, tensor in case.inputs().items() if not name.endswith("value")}
    actual = attention_maps(**inputs, maps=case.maps, statistics=statistics)
    exact = exact_maps(**inputs, maps=case.maps, statistics=statistics)
    baseline = pytorch_maps(**inputs, maps=case.maps, statistics=statistics)
    assert_accurate(actual.maps, exact.maps, baseline.maps)
    rows = {"probability": 70, "logit": 70 + 33, "text_probability": 0}[kind]
    assert (0 if actual.lse is None else actual.lse.shape[-1]) == rows
    if statistics:
        assert actual.statistics.image_value_norm is None
        for name in ("image_to_text", "text_to_text"):
            assert_accurate(*(getattr(r.statistics, name) for r in (actual, exact, baseline)), name=name)


def test_rows_of_the_whole_matrix_sum_to_one() -> None:
    """Swapping the streams shows the other half of each row's attention mass: together they are all of it."""
    inputs = attention_inputs(1, 70, 33, 2, 64, torch.bfloat16)
    names = {name: name[5:] if name.startswith("text_") else f"text_{name}" for name in inputs}
    swapped = {names[name]: tensor for name, tensor in inputs.items()}
    one = joint_attention(**inputs, statistics=True).statistics
    other = joint_attention(**swapped, statistics=True).statistics
    # By rows of the images and of the text; sums of a few hundred float32 terms.
    for here, there in ((one.image_to_text, other.text_to_text), (one.text_to_text, other.image_to_text)):
        assert float(here.min()) > 0
        assert float(here.max()) < 1
        torch.testing.assert_close(here + there, torch.ones_like(here), rtol=3e-6, atol=0)


def fused_views(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as strided views: thirds of a fused projection, [B, tokens, 3, H, D]."""
    views = {}
    for prefix in ("", "text_"):
        names = [f"{prefix}{name}" for name in ("query", "key", "value")]
        fused = torch.stack([inputs[name] for name in names], dim=2)
        views.update({name: fused[:, :, index] for index, name in enumerate(names)})
    return views


@pytest.mark.parametrize("layout", sample(["fused", "heads-first", "channels-strided", "broadcast-batch"]))
def test_strides(layout: str) -> None:
    """The same numbers through other strides give the same bits, gradients included."""
    inputs = attention_inputs(2, 33, 17, 2, 16, torch.float16)
    if layout == "broadcast-batch":
        inputs = {name: tensor[:1].expand(2, -1, -1, -1).clone() for name, tensor in inputs.items()}
    views = {
        "fused": fused_views,
        "heads-first": lambda given: {
            n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in given.items()
        },
        "channels-strided": lambda given: {
            n: torch.stack([t, t.flip(0)], dim=-1)[..., 0] for n, t in given.items()
        },
        "broadcast-batch": lambda given: {n: t[:1].expand(2, -1, -1, -1) for n, t in given.items()},
    }[layout](inputs)
    assert not any(view.is_contiguous() for view in views.values())
    results = []
    for tensors in (inputs, views):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        result = joint_attention(**leaves, maps=MapRequest())
        # A broadcast upstream gradient, as sum() gives, and a transposed one.
        wanted = result.image.sum() + (result.text.transpose(1, 2) * result.text.transpose(1, 2)).sum()
        gradients = torch.autograd.grad(wanted + 1000 * (result.maps**2).sum(), list(leaves.values()))
        results.append([result.image, result.text, result.maps, *gradients])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


GRADIENT = [
    Case(70, 33, 2, 64, "bf16", "probability", "mean", edited=True, batch=2),
    Case(65, 17, 2, 32, "fp16", "probability", "mean", text=(2, 15)),
    Case(64, 33, 3, 16, "fp32", "probability", "each", text=(0, 8)),
    Case(131, 17, 1, 64, "fp16", "logit", "mean", edited=True),
    Case(33, 17, 3, 96, "bf16", "logit", "each"),
    Case(1, 33, 2, 128, "fp32", "logit", "each", text=(10, 20)),
    Case(70, 33, 2, 40, "bf16", "text_probability", "mean", text=(0, 20)),
    Case(64, 33, 3, 64, "fp32", "text_probability", "mean", edited=True),
    Case(33, 65, 2, 128, "fp16", "text_probability", "each"),
    Case(1, 33, 2, 256, "bf16", "probability", "mean", scale=0.1),
]
UPSTREAM = {
    "both": ("image", "text", "maps"),
    "outputs": ("image", "text"),
    "map": ("maps",),
    "image": ("image",),
    "text-and-map": ("text", "maps"),
}


def upstream(case: Case, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Random upstream gradients; the map's is scaled to weigh as much as the output's."""
    generator = torch.Generator().manual_seed(7)
    keys = case.tokens + case.text_tokens
    first, last = case.maps.text_range(case.text_tokens)
    shapes = {
        "image": (case.batch, case.tokens, case.heads, case.head_dim),
        "text": (case.batch, case.text_tokens, case.heads, case.head_dim),
        "maps": (case.batch, *([case.heads] if case.reduction == "each" else []), case.tokens, last - first),
    }
    weight = {"image": 1.0, "text": 1.0, "maps": keys**0.5 * (case.heads if case.reduction == "mean" else 1)}
    drawn = {name: weight[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: drawn[name] for name in names}


def gradients(
    attend: Callable[..., JointAttention | AttentionMaps],
    inputs: dict[str, Tensor],
    given: dict[str, Tensor],
    **options: Any,
) -> dict[str, Tensor | None]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    result = attend(**leaves, **options)
    outputs = [getattr(result, name) for name in given]
    upstreams = [gradient.to(output.dtype) for gradient, output in zip(given.values(), outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), upstreams, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def pairs() -> list[tuple[Case, str]]:
    """Every case with both gradients, and with one of the other choices of upstream gradient in turn."""
    others = [name for name in UPSTREAM if name != "both"]
    return [(c, g) for i, c in enumerate(GRADIENT) for g in ("both", others[i % len(others)])]


@pytest.mark.parametrize(("case", "given"), sample(pairs(), every=5), ids=str)
def test_gradients(case: Case, given: str) -> None:
    judge_gradients(case, upstream(case, UPSTREAM[given]), case.inputs(), maps=case.maps, scale=case.scale)


def judge_gradients(case: Case, wanted: dict[str, Tensor], inputs: dict[str, Tensor], **options: Any) -> None:
    actual = gradients(joint_attention, inputs, wanted, **options)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    # The upstream gradients that the kernels see are rounded to the dtype of the outputs; so are these.
    rounded = {n: g if n == "maps" else g.to(DTYPES[case.dtype]) for n, g in wanted.items()}
    exact = gradients(exact_attention, wide, rounded, **options)
    baseline = gradients(pytorch_attention, inputs, wanted, **options)
    for name in inputs:
        true, found, usual = exact[name], actual[name], baseline[name]
        assert found is not None
        if true is None or not true.any():
            assert not found.any(), name
            continue
        usual = torch.zeros_like(found) if usual is None else usual
        assert_accurate(found, true, usual, name=f"d_{name} of {case}")


@pytest.mark.parametrize("kind", ["probability", "logit", "text_probability"])
def test_gradients_of_maps_alone(kind: str) -> None:
    case = Case(33, 65, 2, 32, "fp16", kind, "mean", batch=2, text=(0, 60))
    inputs = {name: t for name, t in case.inputs().items() if name in ("query", "key", "text_key")}

    wanted = upstream(case, ("maps",))
    options: dict[str, Any] = {"maps": case.maps, "text_query": None}
    actual = gradients(attention_maps, inputs, wanted, **options)
    exact = gradients(exact_maps, {n: t.double() for n, t in inputs.items()}, wanted, **options)
    baseline = gradients(pytorch_maps, inputs, wanted, **options)
    for name in inputs:
        true, found, expected = exact[name], actual[name], baseline[name]
        assert found is not None
        if true is None or not true.any():
            assert not found.any(), name
        else:
            assert_accurate(found, true, expected, name=f"d_{name}")


def some_bias(batch: int, text_tokens: int) -> Tensor:
    """Random, another one for each image, with masked columns on the left, in the middle and on the right."""
    bias = 2 * torch.randn(batch, text_tokens, generator=torch.Generator().manual_seed(5))
    for row in range(batch):
        bias[row, : row + 1] = bias[row, text_tokens // 2] = bias[row, -3 + row :] = -torch.inf
    return bias


BIASED = [
    Case(70, 33, 2, 64, "bf16", "probability", "mean", edited=True, batch=2),
    Case(64, 33, 2, 32, "fp16", "text_probability", "each", text=(2, 30)),
    Case(33, 40, 2, 96, "fp32", "logit", "mean"),
    Case(70, 17, 1, 16, "fp32", "text_probability", "mean", batch=2),
    Case(33, 17, 2, 40, "bf16", "probability", "each", text=(0, 8)),
]


@pytest.mark.parametrize("case", sample(BIASED, every=2), ids=str)
def test_text_bias(case: Case) -> None:
    """Forward, statistics and gradients with a bias; what it masks is exactly zero."""
    inputs, bias = case.inputs(), some_bias(case.batch, case.text_tokens)
    options: dict[str, Any] = {"maps": case.maps, "statistics": True, "text_bias": bias}
    actual = joint_attention(**inputs, **options)
    exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
    judge(case, actual, exact, baseline)
    names = ("image_to_text", "text_to_text")
    assert_accurate(
        *(torch.cat([getattr(r.statistics, n) for n in names], dim=-1) for r in (actual, exact, baseline))
    )
    assert_accurate(actual.lse, exact.lse, baseline.lse, name=f"lse of {case}")
    masked = bias.isneginf()[:, slice(*case.text or (None,))]
    for image, entries in enumerate(actual.maps):
        assert not entries[..., masked[image]].any()
    given = upstream(case, UPSTREAM["both"])
    judge_gradients(case, given, inputs, maps=case.maps, text_bias=bias)
    found = gradients(joint_attention, inputs, given, maps=case.maps, text_bias=bias)
    for image in range(case.batch):
        for name in ("text_key", "text_value"):
            assert not found[f"{name}"][image, bias[image].isneginf()].any()  # type: ignore[index]


@pytest.mark.parametrize("kind", ["probability", "logit", "text_probability"])
def test_text_that_is_masked_altogether(kind: str) -> None:
    """The second of two images has no valid text token: its map and the map's gradients are zero, not NaN."""
    case = Case(33, 17, 2, 16, "fp32", kind, "mean", batch=2)
    inputs, bias = case.inputs(), some_bias(2, 17)
    bias[1] = -torch.inf
    options: dict[str, Any] = {"maps": case.maps, "text_bias": bias}
    actual = joint_attention(**inputs, statistics=True, **options)
    exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
    judge(case, actual, exact, baseline)
    assert not actual.maps[1].any()
    assert not actual.statistics.image_to_text[1].any()
    judge_gradients(case, upstream(case, UPSTREAM["both"]), inputs, **options)
    of_map = gradients(joint_attention, inputs, upstream(case, ("maps",)), **options)
    for name, found in of_map.items():
        assert found is None or not found[1].any(), name
    alone = {name: tensor for name, tensor in inputs.items() if not name.endswith("value")}
    torch.testing.assert_close(attention_maps(**alone, **options).maps, actual.maps, rtol=3e-6, atol=0)


@pytest.mark.parametrize(
    "case",
    sample(
        [
            Case(70, 33, 2, 64, "bf16", "probability", "mean", edited=True, batch=2),
            Case(33, 70, 2, 32, "fp16", "text_probability", "each", batch=2),
            Case(70, 17, 1, 96, "fp32", "logit", "mean", batch=2),
        ],
        every=3,
    ),
    ids=str,
)
@pytest.mark.parametrize(
    "absent", [("key", "value"), ("text_query",), ("key", "value", "text_query")], ids=str
)
def test_without_image_keys_or_text_queries(case: Case, absent: tuple[str, ...]) -> None:
    """Without a bias, and with one that leaves the second of two images no valid text token."""
    inputs = case.inputs()
    given = upstream(case, ("image", "maps") if "text_query" in absent else UPSTREAM["both"])
    inputs = {name: tensor for name, tensor in inputs.items() if name not in absent}
    bias = some_bias(2, case.text_tokens)
    bias[1] = -torch.inf
    for added in (None, bias):
        options: dict[str, Any] = {"maps": case.maps, "text_bias": added, **dict.fromkeys(absent)}
        actual, exact, baseline = (
            attend(**inputs, **options, statistics=True)
            for attend in (joint_attention, exact_attention, pytorch_attention)
        )
        for name in ("image", "text", "maps"):
            if name == "text" and "text_query" in absent:
                assert actual.text.shape[1] == 0
                continue
            assert_accurate(*(getattr(r, name) for r in (actual, exact, baseline)), name=name)
        assert torch.equal(actual.lse.isneginf(), exact.lse.isneginf())
        finite = exact.lse.isfinite()
        assert_accurate(actual.lse[finite], exact.lse[finite], baseline.lse[finite], name="lse")
        masses = (
            torch.cat([r.statistics.image_to_text, r.statistics.text_to_text], -1) for r in (actual, exact)
        )
        torch.testing.assert_close(next(masses).double(), next(masses), rtol=1e-5, atol=0)
        judge_gradients(case, given, inputs, **options)


def test_text_rows_first() -> None:
    """The same bits in the other order, gradients included."""
    inputs = attention_inputs(2, 33, 17, 2, 16, torch.float16)
    found = []
    for text_first in (False, True):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        result = joint_attention(**leaves, text_first=text_first)
        parts = [result.text, result.image] if text_first else [result.image, result.text]
        assert torch.equal(result.joint, torch.cat(parts, dim=1))
        loss = (result.image**2).sum() + (result.text**3).sum()
        found.append([result.image, result.text, *torch.autograd.grad(loss, list(leaves.values()))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [("image", slice(40, 70)), ("text", slice(3, 20))], ids=str)
def test_gradients_of_chosen_rows(rows: Any) -> None:
    """A map alone of fewer rows than there are image keys."""
    case = Case(70, 33, 2, 32, "fp32")
    inputs = {name: tensor for name, tensor in case.inputs().items() if not name.endswith("value")}
    request = MapRequest(rows=rows, columns=("text", slice(0, 30)))
    options: dict[str, Any] = {"maps": request}
    shown = attention_maps(**inputs, **options).maps
    given = {"maps": 100 * torch.randn(shown.shape, generator=torch.Generator().manual_seed(1))}
    exact = gradients(exact_maps, {n: t.double() for n, t in inputs.items()}, given, **options)
    baseline = gradients(pytorch_maps, inputs, given, **options)
    for name, found in gradients(attention_maps, inputs, given, **options).items():
        true, usual = exact[name], baseline[name]
        if true is None or not true.any():
            assert found is None or not found.any(), name
        else:
            assert_accurate(found, true, usual, name=f"d_{name}")


def growing(growth: float, dtype: torch.dtype, *, tokens: int = 200, head_dim: int = 16) -> dict[str, Tensor]:
    """Inputs whose scores grow along the image keys, by ``growth`` nats from the first key to the last but 8.

    Only in the first head; in the second they stay near zero, as do those of the last 8 keys.
    """
    inputs = attention_inputs(1, tokens, 33, 2, head_dim, dtype, sharpness=1.0)
    for name in ("query", "text_query"):
        inputs[name][:, :, 0, 0] = 8.0
    inputs["text_key"][:, :, 0, 0] = 0.0
    inputs["key"][:, :, 0, 0] = 0.0
    inputs["key"][0, :-8, 0, 0] = torch.linspace(0, growth * head_dim**0.5 / 8, tokens - 8).to(dtype)
    return inputs


@pytest.fixture
def online_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many full tiles each online pass over the keys begins with: more than one if it is done again."""
    passes: list[int] = []
    attend = forward._attend_online

    def counted(*arguments: Any) -> Any:
        passes.append(int(arguments[SETTLING].handle.data[0]))
        return attend(*arguments)

    monkeypatch.setattr(forward, "_attend_online", counted)
    return passes


SETTLING = list(forward._attend_online.arg_names).index("settling")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("growth", [0, 20, 60, 120, 300, 3000])
def test_scores_that_outgrow_the_shift(dtype: str, growth: float, online_passes: list[int]) -> None:
    """The text and the first tile settle a row's shift; rows that outgrow it are done again, exactly."""
    inputs = growing(growth, DTYPES[dtype])
    options: dict[str, Any] = {"maps": MapRequest(heads="each")}
    actual = joint_attention(**inputs, **options)
    exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
    for name in ("image", "text", "lse"):
        for head in range(2):
            parts = [getattr(result, name) for result in (actual, exact, baseline)]
            parts = [part[:, head] if name == "lse" else part[:, :, head] for part in parts]
            assert_accurate(*parts, name=f"{name} of head {head}")
    assert_accurate(actual.maps[:, 1], exact.maps[:, 1], baseline.maps[:, 1])
    # In the first head an entry may be nearly nothing, or nothing.
    assert_accurate(actual.maps.log1p(), exact.maps.log1p(), baseline.maps.log1p())
    tiles = 4 + 1  # 200 image rows and 33 text rows in tiles of 64
    again = [full for full in online_passes if full > 1]
    assert len(online_passes) == 2 * tiles + len(again)
    assert len(again) == (tiles if growth >= 60 and dtype != "fp16" else 0)  # those of the first head


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy
def test_without_doing_again_large_scores_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = growing(120, torch.bfloat16)
    assert joint_attention(**inputs).image.isfinite().all()
    monkeypatch.setattr(forward, "_LARGE", forward.tl.constexpr(float("inf")))
    assert joint_attention(**inputs).lse[:, 1].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_numbers_beside_rows_that_outgrow_their_shift(dtype: str) -> None:
    inputs = growing(300, DTYPES[dtype])
    inputs["query"][0, 3, 0, 5] = torch.nan
    inputs["query"][0, 70, 1, 5] = torch.inf
    actual, exact = joint_attention(**inputs), exact_attention(**inputs)
    baseline = pytorch_attention(**inputs)
    for name in ("image", "text", "lse"):
        found, true, usual = (getattr(result, name) for result in (actual, exact, baseline))
        assert torch.equal(found.isfinite(), true.isfinite()), name
        assert_accurate(*(part[true.isfinite()] for part in (found, true, usual)), name=name)
    assert actual.image.isnan().sum() == 2 * 16  # one row of either head


def test_two_runs_are_bitwise_equal() -> None:
    case = Case(65, 33, 2, 32, "bf16", "probability", "mean", edited=True)
    runs = []
    for _ in range(2):
        result = joint_attention(**case.inputs(), maps=case.maps, statistics=True)
        given = upstream(case, UPSTREAM["both"])
        found = gradients(joint_attention, case.inputs(), given, maps=case.maps)
        runs.append([result.image, result.text, result.maps, result.lse, *found.values()])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


ADDRESSES = [
    Case(70, 33, 2, 24, "bf16", "probability", "mean", edited=True, batch=2, text=(2, 15)),
    Case(64, 32, 2, 16, "fp16", "text_probability", "each"),
    Case(33, 7, 1, 96, "fp32", "logit", "mean"),
    Case(1, 65, 2, 16, "bf16", "probability", "each", text=(64, 65)),
]


@pytest.mark.parametrize("case", ADDRESSES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "fused"])
def test_kernels_stay_inside_their_tensors(case: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No load and no store leaves the tensors of its launch, padding and tails masked away."""
    inputs = case.inputs()
    if layout == "fused":
        inputs |= fused_views(inputs)
    given = upstream(case, UPSTREAM["both"])
    with watched(monkeypatch) as seen:
        gradients(joint_attention, inputs, given, maps=case.maps, statistics=True)
    assert seen.loads > 20
    assert seen.stores > 10
    assert not seen.stray


def test_an_address_outside_every_tensor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention_inputs(1, 33, 9, 1, 16, torch.float32)
    inputs |= {name: t[:, :7] for name, t in inputs.items() if name.startswith("text_")}  # nobody's beyond
    start = forward.Launch.start

    def too_many(launch: forward.Launch) -> None:
        if launch.kernel is maps.map_kernel:
            launch.arguments["last"] += 1
        start(launch)

    monkeypatch.setattr(forward.Launch, "start", too_many)
    with watched(monkeypatch) as seen:
        joint_attention(**inputs, maps=MapRequest())
    assert any("load" in line and "map_kernel" in line for line in seen.stray)
    assert any("store" in line for line in seen.stray)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles", [(16, 32), (32, 128), (128, 32)], ids=lambda tiles: f"{tiles[0]}x{tiles[1]}"
)
def test_other_tiles(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No shape of tile is built into a kernel: the tuning table is free to choose."""
    config = tuning.Config(*tiles, 4, 1)
    configs = tuning.Tuning(config, config, config, config, config)
    monkeypatch.setattr(tuning, "tuning_for", lambda tensor: configs)
    case = Case(35, 33, 2, 32, "fp16", "probability", "mean", edited=True)
    inputs = case.inputs()
    options: dict[str, Any] = {"maps": case.maps}
    judge(
        case,
        joint_attention(**inputs, **options),
        exact_attention(**inputs, **options),
        pytorch_attention(**inputs, **options),
    )
    given = upstream(case, UPSTREAM["both"])
    judge_gradients(case, given, inputs, **options)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # of NumPy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["query", "text_key", "value"])
def test_what_is_not_a_number_spreads_as_in_pytorch(name: str, bad: float) -> None:
    """A bad entry makes the same outputs NaN as in PyTorch's attention, and no others."""
    inputs = attention_inputs(1, 33, 17, 2, 16, torch.float32)
    inputs[name][0, 3, 1, 5] = bad
    actual = joint_attention(**inputs, maps=MapRequest(heads="each"))
    expected = pytorch_attention(**inputs, maps=MapRequest(heads="each"))
    for part in ("image", "text", "maps"):
        found, usual = getattr(actual, part), getattr(expected, part)
        assert torch.equal(found.isnan(), usual.isnan()), part
        assert torch.equal(found.isinf(), usual.isinf()), part


def test_operators_keep_the_rules_of_torch_library() -> None:
    inputs = attention_inputs(1, 9, 5, 2, 16, torch.float32)
    tensors = tuple(tensor.requires_grad_() for tensor in inputs.values())
    request = (0.25, "probability", "mean", 0, 5, True)
    for bias in (None, torch.zeros(1, 5)):
        torch.library.opcheck(torch.ops.seg4diff.triton_forward.default, (*tensors, None, bias, *request))


@pytest.mark.parametrize("values", [True, False])
def test_gradient_of_the_log_sum_exp(values: bool) -> None:
    """Which the operator hands on: the softmax over the keys, beside the gradient of a map."""
    names = STREAMS[:6] if values else ("query", "key", "text_query", "text_key")
    inputs = attention_inputs(1, 33, 17, 2, 16, torch.float32)
    weight = torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    request = (0.25, "text_probability", "mean", 0, 17, False)
    given = (*(leaves.get(name) for name in STREAMS), None)
    _, lse, entries = torch.ops.seg4diff.triton_forward(*given, *request)
    loss = (lse * weight.float()).sum() + 100 * entries.square().sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    def exact(dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = {name: inputs[name].to(dtype).requires_grad_() for name in names}
        rows = torch.cat([wide["query"], wide["text_query"]], dim=1)
        keys = torch.cat([wide["key"], wide["text_key"]], dim=1)
        scores = 0.25 * torch.einsum("bqhd,bkhd->bhqk", rows, keys)
        shown = scores[:, :, :33, 33:].softmax(dim=-1).mean(dim=1)
        loss = (scores.logsumexp(dim=-1) * weight.to(dtype)).sum() + 100 * shown.square().sum()
        return torch.autograd.grad(loss, list(wide.values()), materialize_grads=True)

    for name, one, true, usual in zip(names, found, exact(torch.float64), exact(torch.float32), strict=True):
        if name.endswith("value"):
            assert not one.any()
        else:
            assert_accurate(one, true, usual, name=name)


@pytest.mark.parametrize(
    ("rows", "columns"), [("text", "text"), ("text", "image"), ("image", "image")], ids=str
)
def test_gradients_of_maps_of_other_relations(rows: Any, columns: Any) -> None:
    """They reach the softmax by the gradient of the log-sum-exp."""
    case = Case(33, 17, 2, 16, "bf16")
    request = MapRequest(rows=(rows, slice(1, 9)), columns=(columns, slice(2, 12)))
    generator = torch.Generator().manual_seed(4)
    given = {
        "image": torch.randn(1, 33, 2, 16, generator=generator),
        "text": torch.randn(1, 17, 2, 16, generator=generator),
        "maps": 100 * torch.randn(1, 8, 10, generator=generator),
    }
    judge_gradients(case, given, case.inputs(), maps=request)
    judge_gradients(case, {"maps": given["maps"]}, case.inputs(), maps=request)


PROVIDED = [
    Case(70, 33, 2, 16, "fp32", "probability", "mean", text=(3, 30), batch=2),
    Case(33, 17, 2, 40, "bf16", "probability", "each", edited=True),
    Case(33, 65, 2, 32, "fp32", "text_probability", "mean"),
    Case(33, 17, 2, 16, "fp16", "logit", "each", text=(0, 8)),
]


@pytest.mark.parametrize("case", sample(PROVIDED, every=2), ids=str)
def test_the_map_of_a_provider(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our map pass, its gradient and row sum, around the attention of another kernel."""
    launched: list[str] = []
    start = launch.Launch.start

    def noted(self: launch.Launch) -> None:
        launched.append(self.kernel.__name__)
        start(self)

    monkeypatch.setattr(launch.Launch, "start", noted)
    inputs, options = case.inputs(), {"maps": case.maps, "scale": case.scale}
    with backend("own"):
        actual = joint_attention(**inputs, **options, statistics=True)
        exact, baseline = exact_attention(**inputs, **options), pytorch_attention(**inputs, **options)
        judge(case, actual, exact, baseline)
        assert "map_kernel" in launched
        assert "mass_kernel" in launched
        for names in ("both", "map"):
            launched.clear()
            judge_gradients(case, upstream(case, UPSTREAM[names]), inputs, **options)
            assert {"query_gradient_kernel", "key_gradient_kernel"} <= set(launched)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_kernel_that_cannot_be_built_is_replaced(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of both directions, one launch fails; the answers are those of ATen, and nothing is tried again."""
    failing = {"forward": "attention_kernel", "backward": "key_gradient_kernel"}[part]
    failed: list[str] = []
    start = launch.Launch.start

    def out_of_resources(self: launch.Launch) -> None:
        if self.kernel.__name__ == failing:
            failed.append(failing)
            raise OutOfResources(232448, 101376, "shared memory")
        start(self)

    monkeypatch.setattr(launch.Launch, "start", out_of_resources)
    monkeypatch.setattr(fallback, "FAILED", {})
    case = Case(33, 17, 2, 16, "fp32")
    with backend("auto"):
        monkeypatch.setattr(api, "_automatic", lambda inputs: "triton")
        for _ in range(2):
            judge_gradients(case, upstream(case, UPSTREAM["both"]), case.inputs(), maps=case.maps)
    assert failed == [failing]
    assert len(caplog.messages) == 1
    assert f"triton {part} could not be built" in caplog.text
    with pytest.raises(OutOfResources):
        judge_gradients(case, upstream(case, UPSTREAM["both"]), case.inputs(), maps=case.maps)


def test_compiles_as_one_graph() -> None:
    inputs = attention_inputs(1, 33, 17, 2, 16, torch.float32)

    def model(scale: Tensor, **streams: Tensor) -> Tensor:
        streams["query"] = streams["query"] * scale
        result = joint_attention(**streams, maps=MapRequest(), statistics=True)
        return result.image.sum() + result.maps.square().sum() + result.statistics.image_to_text.sum()

    losses, found, counter = [], [], CompileCounter()
    for function in (model, torch.compile(model, fullgraph=True, backend=counter)):
        scale = torch.tensor(1.5, requires_grad=True)
        losses.append(function(scale, **inputs))
        found.append(torch.autograd.grad(losses[-1], scale)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(found[0], found[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [(torch.float64, 64, "float64"), (torch.float16, 8, "head dim 8"), (torch.float16, 60, "head dim 60"),
     (torch.float16, 264, "head dim 264")],
)  # fmt: skip
def test_what_it_cannot_do_names_what_can(dtype: torch.dtype, head_dim: int, reason: str) -> None:
    inputs = attention_inputs(1, 4, 3, 1, head_dim, torch.float32)
    with pytest.raises(ValueError, match=rf'{reason}.*backend\("aten"\) can'):
        joint_attention(**{n: t.to(dtype) for n, t in inputs.items()})
    assert triton_backend.refusal(inputs["query"].to(dtype)) is not None
