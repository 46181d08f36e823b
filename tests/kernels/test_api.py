"""What `joint_attention` accepts, what it refuses, and that a refusal says what would do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seg4diff.kernels import api
from seg4diff.kernels.api import attention_maps, backend, joint_attention
from seg4diff.kernels.testing import attention_inputs
from seg4diff.kernels.types import Inputs, MapRequest


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return attention_inputs(2, 6, 4, 3, 8, torch.float32, edited=True)


def changed(inputs: dict[str, Tensor], **replaced: Any) -> dict[str, Any]:
    return {**inputs, **{name: change(inputs[name]) for name, change in replaced.items()}}


SHAPES = [
    pytest.param({"key": lambda t: t[0]}, r"key has shape \[6, 3, 8\].*\[batch, tokens, heads,", id="rank"),
    pytest.param({"text_key": lambda t: t[0, 0, 0]}, r"text_key has shape \[8\]", id="rank-of-the-text"),
    pytest.param({"value": lambda t: t[:1]}, "value has batch size 1.*query has 2", id="batch"),
    pytest.param({"text_query": lambda t: t[:, :, :1]}, "text_query has number of heads 1", id="heads"),
    pytest.param({"text_key": lambda t: t[..., :4]}, "text_key has head dim 4.*query has 8", id="head-dim"),
    pytest.param({"value": lambda t: t[:, :5]}, "value has 5 tokens, but query has 6", id="length"),
    pytest.param({"text_value": lambda t: t[:, :3]}, "text_value has 3 tokens, but text_key", id="text"),
    pytest.param({"text_value_for_image": lambda t: t[:, :3]}, "text_value_for_image has 3", id="edited"),
    pytest.param({"value": lambda t: t.to("meta")}, "value is on meta, but query is on cpu", id="device"),
    pytest.param({"query": lambda t: t[:, :0]}, "query has shape .* zero tokens", id="no-image"),
    pytest.param({"text_query": lambda t: t[:, :0]}, "text_query has shape .* zero tokens", id="no-text"),
    pytest.param({"query": lambda t: t[:, :, :, :0]}, "query has .* axis of length zero", id="empty-axis"),
]


@pytest.mark.parametrize(("replaced", "message"), SHAPES)
def test_shapes_that_do_not_fit(inputs: dict[str, Tensor], replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint_attention(**changed(inputs, **replaced))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        pytest.param({"key": lambda t: t.tolist()}, "key must be a tensor, got list", id="no-tensor"),
        pytest.param({"text_key": lambda t: None}, "text_key must be a tensor, got NoneType", id="none"),
        pytest.param(
            {"query": lambda t: t.long()}, "query has dtype torch.int64; accepted: float16", id="integer"
        ),
        pytest.param(
            {"value": lambda t: t.half()}, "value has dtype torch.float16, but query has", id="mixed"
        ),
    ],
)
def test_dtypes_that_do_not_fit(inputs: dict[str, Tensor], replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        joint_attention(**changed(inputs, **replaced))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["query", "text_key", "text_value"])
def test_a_tensor_that_is_missing(inputs: dict[str, Tensor], name: str, autocast: bool) -> None:
    missing = {**inputs, name: None}
    with torch.autocast("cpu", enabled=autocast):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
            joint_attention(**missing)  # type: ignore[arg-type]
        if name != "text_value":
            streams = (missing["query"], missing["key"], missing["text_query"], missing["text_key"])
            with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
                attention_maps(*streams)  # type: ignore[arg-type]


@pytest.mark.parametrize(("missing", "present"), [("key", "value"), ("value", "key")])
def test_keys_and_values_come_together(inputs: dict[str, Tensor], missing: str, present: str) -> None:
    with pytest.raises(ValueError, match=f"{missing} is None, but {present} is given; give both, or neither"):
        joint_attention(**{**inputs, missing: None})  # type: ignore[arg-type]


def test_meta_tensors_give_shapes(inputs: dict[str, Tensor]) -> None:
    given = {name: tensor.to("meta") for name, tensor in inputs.items()}
    result = joint_attention(**given, maps=MapRequest(), statistics=True)
    assert result.image.shape == given["query"].shape
    assert result.maps.shape == (2, 6, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"kind": "softmax"},
            ValueError,
            "kind='softmax' is unknown; accepted: probability, logit, text_prob",
        ),
        ({"heads": "median"}, ValueError, "heads='median' is unknown; accepted: mean, each$"),
        ({"columns": ("text", slice(0, 4, 2))}, ValueError, "columns=.*has a step; give the indices"),
        ({"rows": ("text", slice(0.5, 2))}, TypeError, "rows=.* integer bounds"),
        ({"columns": ("text", slice(True, 2))}, TypeError, "integer bounds"),
        (
            {"rows": slice(0, 3)},
            TypeError,
            "rows=slice.* must be a stream and a slice",
        ),
        ({"columns": ("text", 3)}, TypeError, "must be a stream and a slice"),
        ({"columns": ("text", [3])}, TypeError, "must be a stream and a slice"),
        ({"columns": ("audio", slice(None))}, ValueError, "unknown stream; accepted: image, text"),
        (
            {"rows": ("image", torch.zeros(2))},
            ValueError,
            "rows has indices of dtype torch.float32 and shape",
        ),
        ({"rows": ("image", torch.zeros(2, 2).long())}, ValueError, r"int64 and shape \[2, 2\]; accepted"),
        ({"rows": ("image", torch.zeros(0).long())}, ValueError, "accepted: int64 of one axis, at least one"),
        (
            {"kind": "text_probability", "columns": ("image", slice(None))},
            ValueError,
            "kind='text_probability' is a softmax over text columns, but columns=.*; use columns=",
        ),
    ],
)
def test_map_requests_that_mean_nothing(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MapRequest(**options)


@pytest.mark.parametrize(
    "text", [slice(0, 5), slice(-2, None), slice(2, 2), slice(3, 1), slice(4, None)], ids=str
)
def test_text_ranges_outside_the_text(inputs: dict[str, Tensor], text: slice) -> None:
    with pytest.raises(ValueError, match="inside the 4 text tokens; use bounds with 0 <= start < stop <= 4"):
        joint_attention(**inputs, maps=MapRequest(columns=("text", text)))


@pytest.mark.parametrize("stream", ["image", "text"])
@pytest.mark.parametrize("where", ["rows", "columns"])
def test_ranges_and_indices_outside_a_stream(inputs: dict[str, Tensor], stream: Any, where: str) -> None:
    length = {"image": 6, "text": 4}[stream]
    for tokens, message in (
        (slice(2, 9), f"{where}=.* inside the {length} {stream} tokens"),
        (
            torch.tensor([0, -1]),
            f"{where} has the index -1 outside the {length} {stream} tokens; accepted: 0 to",
        ),
        (torch.tensor([length]), f"{where} has the index {length} outside the {length} {stream} tokens"),
        (torch.tensor([0], device="meta"), f"{where} has indices on meta, but query is on cpu"),
    ):
        request = MapRequest(**{where: (stream, tokens)})
        with pytest.raises(ValueError, match=message):
            joint_attention(**inputs, maps=request)


def test_a_relation_without_its_tensor(inputs: dict[str, Tensor]) -> None:
    streams = (inputs["query"], None, None, inputs["text_key"])
    with pytest.raises(ValueError, match="text_query is None, but maps.rows=.*text.* needs it"):
        attention_maps(*streams, maps=MapRequest(rows=("text", slice(None))))
    with pytest.raises(ValueError, match="key is None, but maps.columns=.*image.* needs it"):
        attention_maps(*streams, maps=MapRequest(columns=("image", slice(None))))


LSE = r"accepted: torch.float32 \[2, 3, 6\] or \[2, 3, 10\] on cpu"


@pytest.mark.parametrize(
    ("lse", "options", "error", "message"),
    [
        (0.5, {}, TypeError, f"lse must be a tensor, got float; {LSE}"),
        (torch.zeros(2, 3, 7), {}, ValueError, rf"lse is torch.float32 \[2, 3, 7\] on cpu; {LSE}"),
        (torch.zeros(2, 6, 3), {}, ValueError, f"lse is .*{LSE}"),
        (torch.zeros(2, 3, 6).double(), {}, ValueError, f"lse is torch.float64.*{LSE}"),
        (torch.zeros(2, 3, 6, device="meta"), {}, ValueError, f"on meta; {LSE}"),
        (
            torch.zeros(2, 3, 6),
            {"maps": MapRequest(rows=("text", slice(None)))},
            ValueError,
            r"lse is .*accepted: torch.float32 \[2, 3, 10\] on cpu",
        ),
        (
            torch.zeros(2, 3, 6),
            {"maps": MapRequest("logit")},
            ValueError,
            "kind='logit' does not use it; omit",
        ),
        (torch.zeros(2, 3, 10), {"statistics": True}, ValueError, "lse is given, but statistics=True"),
        (torch.full((2, 3, 6), torch.nan), {}, ValueError, "lse has a value of nan; accepted: finite"),
        (torch.full((2, 3, 10), torch.inf), {}, ValueError, "lse has a value of inf; accepted: finite"),
    ],
)
def test_a_log_sum_exp_that_means_nothing(
    inputs: dict[str, Tensor], lse: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    streams = (inputs["query"], inputs["key"], inputs["text_query"], inputs["text_key"])
    with pytest.raises(error, match=message):
        attention_maps(*streams, lse=lse, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"maps": "mean"}, TypeError, "maps='mean' must be a MapRequest"),
        ({"scale": "big"}, TypeError, "scale='big' must be a number or None"),
        ({"scale": True}, TypeError, "scale=True must be a number or None"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale=.*must be a number or None"),
        ({"scale": 0}, ValueError, r"scale=0 must be .*positive.*; None is 1 / sqrt\(head dim\)"),
        ({"scale": -0.1}, ValueError, "scale=-0.1 must be"),
        ({"scale": 1e-40}, ValueError, "scale=1e-40 must be"),  # a kernel would multiply by zero
        ({"scale": float("nan")}, ValueError, "scale=nan must be"),
        ({"scale": float("inf")}, ValueError, "scale=inf must be"),
        ({"scale": 1e300}, ValueError, "scale=1e[+]300 must be"),
        ({"statistics": "no"}, TypeError, "statistics='no' must be True or False"),
    ],
)
@pytest.mark.parametrize("name", ["aten", "reference"])
def test_options_that_mean_nothing(
    inputs: dict[str, Tensor], options: dict[str, Any], error: type[Exception], message: str, name: Any
) -> None:
    with backend(name):
        with pytest.raises(error, match=message):
            joint_attention(**inputs, **options)
        streams = (inputs["query"], inputs["key"], inputs["text_query"], inputs["text_key"])
        with pytest.raises(error, match=message):
            attention_maps(*streams, **options)


def test_an_order_that_is_not_a_bool(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match="text_first='text' must be True or False"):
        joint_attention(**inputs, text_first="text")  # type: ignore[arg-type]


def test_a_compiled_function_may_change_its_scale(inputs: dict[str, Tensor]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(joint_attention, fullgraph=True, backend="eager")
    for scale in (0.3, 0.4, 0.5):
        expected = joint_attention(**inputs, scale=scale)
        assert torch.equal(compiled(**inputs, scale=scale).image, expected.image)
    with pytest.raises(ValueError, match="scale=-0.5 must be"):
        joint_attention(**inputs, scale=-0.5)


def test_triton_refuses_a_cpu_and_names_what_can(inputs: dict[str, Tensor]) -> None:
    wide = {name: tensor.repeat(1, 1, 1, 4) for name, tensor in inputs.items()}
    with backend("triton"):
        with pytest.raises(
            ValueError, match=r'backend\("triton"\) cannot run this: .*; backend\("aten"\) can'
        ):
            joint_attention(**wide)
        with backend("aten"):
            assert joint_attention(**wide).image.shape == wide["query"].shape


def test_auto_says_once_why_triton_does_not_run(
    inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnGPU:
        device = torch.device("cuda")
        shape = inputs["query"].shape
        requires_grad = False

    given = Inputs(**inputs)
    object.__setattr__(given, "query", OnGPU())
    monkeypatch.setattr(api, "refusal", lambda *call: "a reason of this test")
    with caplog.at_level("DEBUG", logger="seg4diff.kernels.api"):
        for _ in range(2):
            assert api._attend_of("auto", given) is api.aten.attend
    assert caplog.messages == ["ATen computes what Triton cannot: a reason of this test"]


def ran(inputs: dict[str, Tensor]) -> str:
    """The backend that a call takes: operators have a gradient formula, the reference has autograd's."""
    query = inputs["query"].clone().requires_grad_()
    formula = type(joint_attention(**{**inputs, "query": query}).joint.grad_fn).__name__
    return "aten" if "aten_forward" in formula else "reference"


def test_the_innermost_backend_runs(inputs: dict[str, Tensor]) -> None:
    order = [ran(inputs)]
    with backend("reference"):
        order.append(ran(inputs))
        with pytest.raises(ValueError, match="tokens"), backend("aten"):
            joint_attention(**changed(inputs, key=lambda t: t[:, :0]))
        order.append(ran(inputs))
        with backend("auto"):
            order.append(ran(inputs))
        order.append(ran(inputs))
    order.append(ran(inputs))
    assert order == ["aten", "reference", "reference", "aten", "reference", "aten"]


def test_backends_that_do_not_exist(inputs: dict[str, Tensor]) -> None:
    with backend("reference"):
        with (
            pytest.raises(
                ValueError, match="backend='cuda' is unknown; accepted: auto, reference, aten, triton"
            ),
            backend("cuda"),  # type: ignore[arg-type]
        ):
            pass
        assert ran(inputs) == "reference"


class Graphs:
    """A compiler for torch.compile that notes the backends in each graph and runs it as it is."""

    def __init__(self) -> None:
        self.traced: list[list[str]] = []
        self.latest: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        names = {"softmax": "reference", "seg4diff.aten_forward.default": "aten"}
        backends = [names[str(node.target)] for node in graph.graph.nodes if str(node.target) in names]
        self.traced.append(backends)

        def run(*tensors: Tensor) -> Any:
            self.latest = backends
            return graph(*tensors)

        return run


def test_a_backend_around_a_compiled_function(inputs: dict[str, Tensor]) -> None:
    torch.compiler.reset()
    graphs = Graphs()
    compiled = torch.compile(joint_attention, fullgraph=True, backend=graphs)
    for _ in range(2):
        compiled(**inputs)
        assert graphs.latest == ["aten"]
        with backend("reference"):
            compiled(**inputs)
        assert graphs.latest == ["reference"] * 2  # a softmax for each stream
    assert len(graphs.traced) == 2  # one graph for each


def test_a_backend_inside_a_compiled_function(inputs: dict[str, Tensor]) -> None:
    def model(query: Tensor) -> list[Tensor]:
        given = {**inputs, "query": query}
        images = [joint_attention(**given).image]
        with backend("reference"):
            images.append(joint_attention(**given).image)
            with backend("aten"):
                images.append(joint_attention(**given).image)
            images.append(joint_attention(**given).image)
        return [*images, joint_attention(**given).image]

    torch.compiler.reset()
    graphs = Graphs()
    expected = model(inputs["query"])
    found = torch.compile(model, fullgraph=True, backend=graphs)(inputs["query"])
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert graphs.traced == [["aten", *["reference"] * 2, "aten", *["reference"] * 2, "aten"]]
    assert ran(inputs) == "aten"


def test_nothing_runs_before_the_checks(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(name: str, *call: Any) -> Any:
        raise AssertionError("a backend was asked for")

    monkeypatch.setattr(api, "_attend_of", chosen)
    with pytest.raises(ValueError, match="tokens"):
        joint_attention(**changed(inputs, text_value=lambda t: t[:, :3]))
    with pytest.raises(ValueError, match="inside the 4 text tokens"):
        joint_attention(**inputs, maps=MapRequest(columns=("text", slice(0, 9))))
    with pytest.raises(AssertionError, match="asked for"):
        joint_attention(**inputs)


def test_maps_alone_need_text_queries_for_the_statistics_only(inputs: dict[str, Tensor]) -> None:
    streams = (inputs["query"], inputs["key"], None, inputs["text_key"])
    with pytest.raises(ValueError, match="text_query=None, but statistics=True needs it"):
        attention_maps(*streams, statistics=True)
    with pytest.raises(TypeError, match="maps=None must be a MapRequest"):
        attention_maps(*streams, maps=None)  # type: ignore[arg-type]
    result = attention_maps(*streams)
    assert result.maps.shape == (2, 6, 4)


@pytest.mark.parametrize("heads", ["mean", "each"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_result_has_the_documented_shapes(heads: Any, dtype: torch.dtype) -> None:
    inputs = attention_inputs(2, 6, 5, 3, 8, dtype)
    result = joint_attention(
        **inputs, maps=MapRequest(heads=heads, columns=("text", slice(1, 4))), statistics=True
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (result.image.shape, result.image.dtype) == ((2, 6, 3, 8), dtype)
    assert (result.text.shape, result.text.dtype) == ((2, 5, 3, 8), dtype)
    assert (result.maps.shape, result.maps.dtype) == ((2, 3, 6, 3) if heads == "each" else (2, 6, 3), wide)
    assert (result.lse.shape, result.lse.dtype) == ((2, 3, 11), wide)
    statistics = result.statistics
    assert statistics.image_to_text.shape == statistics.image_value_norm.shape == (2, 3, 6)
    assert statistics.text_to_text.shape == statistics.text_value_norm.shape == (2, 3, 5)
    plain = joint_attention(**inputs)
    assert plain.maps is None
    assert plain.statistics is None
