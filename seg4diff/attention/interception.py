"""Runs a stock attention processor with its one attention call replaced.

Every diffusers processor ends in a call of `dispatch_attention_fn` or `F.scaled_dot_product_attention` on
queries, keys and values that are complete: projected, normalised, rotated, concatenated. Replacing that call
and nothing else serves every model family, fused projections and IP-Adapters included, and follows diffusers
when a processor changes. No module of diffusers is modified: a subclass of the processor's class runs the
same code with a global scope of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_DISPATCH = "dispatch_attention_fn"
_SDPA = "scaled_dot_product_attention"


class Answer:
    """What takes the place of a processor's attention call."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> tuple[Tensor, Any] | None:
        """Output [B, S, H, D] and results of the attention of [B, S, H, D] tensors.

        None leaves the call to diffusers, for an attention that is not the joint one.
        """
        raise NotImplementedError


RESULT_ATTRIBUTE = "seg4diff_attention"
"""Where the results of a layer's latest attention wait on its attention module, for `Patch.results` alone."""


def can_intercept(processor: Any) -> bool:
    """Whether the processor is one of diffusers that calls an attention function which can be replaced."""
    cls = type(stock_of(processor))
    call = cls.__call__
    if not isinstance(call, FunctionType) or not cls.__module__.startswith("diffusers."):
        return False
    # Perturbed-attention guidance runs its own rows through two attentions.
    return not cls.__name__.startswith("PAG") and not _names(call.__code__).isdisjoint((_DISPATCH, _SDPA))


def stock_of(processor: Any) -> Any:
    """The stock processor behind an intercepted one, or `processor` itself."""
    return getattr(processor, "seg4diff_stock", processor)


class Interceptor:
    """Makes processors of one stock class answer; one object serves a transformer for its whole life.

    Class and scope stay the same from one context to the next, so that compiled graphs do.
    """

    def __init__(self, stock: type) -> None:
        slot = _Slot()
        call = _rebound(stock.__call__, slot)

        @wraps(stock.__call__)  # the attention module drops arguments that the signature does not name
        def run(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
            slot.answer, slot.results = self.seg4diff_answer, None
            output = call(self, attn, *args, **kwargs)
            if slot.results is None:
                raise RuntimeError(
                    f"{stock.__name__} made no joint attention call, so its maps, statistics and edits are "
                    "out of reach; leave this layer out"
                )
            setattr(attn, RESULT_ATTRIBUTE, slot.results)
            slot.answer = slot.results = None
            return output

        def copied(self: Any, memo: dict[int, Any]) -> Any:
            return deepcopy(self.seg4diff_stock, memo)  # copies of the model are stock

        members = {"__call__": run, "__deepcopy__": copied, "__module__": stock.__module__}
        self._cls = type(stock.__name__, (stock,), members)

    def intercepted(self, processor: Any, answer: Answer) -> Any:
        """`processor`, which is not changed, with `answer` in place of its joint attention."""
        copy: Any = object.__new__(self._cls)
        copy.__dict__.update(processor.__dict__, seg4diff_answer=answer, seg4diff_stock=processor)
        return copy


class _Slot:
    """Carries the answer of the processor that runs into its attention call, and the results out."""

    answer: Answer | None = None
    results: Any = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        stock: Callable[[], Tensor],
    ) -> Tensor:
        """[B, S, H, D] each -> [B, S, H, D]; `stock` is the call that would have been made."""
        assert self.answer is not None
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        answered = self.answer(query, key, value, mask, scale)
        if answered is None:
            return stock()
        if self.results is not None:
            raise RuntimeError("a processor made two joint attention calls; leave this layer out")
        output, self.results = answered
        return output


def _rebound(function: Any, slot: _Slot) -> Any:
    """The function with the attention functions of its global scope replaced."""
    # Without __name__, Dynamo reads this scope instead of importing the module of that name.
    scope = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    if _DISPATCH in scope:
        stock_dispatch = scope[_DISPATCH]

        def dispatch(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            **other: Any,
        ) -> Tensor:
            def stock() -> Tensor:
                return stock_dispatch(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **other
                )

            return slot.attend(query, key, value, attn_mask, scale, stock)

        scope[_DISPATCH] = dispatch
    if scope.get("F") is F:

        def sdpa(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            def stock() -> Tensor:
                output = F.scaled_dot_product_attention(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
                return output.transpose(1, 2)

            q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return slot.attend(q, k, v, attn_mask, scale, stock).transpose(1, 2)

        scope["F"] = SimpleNamespace(**{**vars(F), _SDPA: sdpa})
    copy = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _names(code: CodeType) -> set[str]:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(_names(entry) for entry in nested))
