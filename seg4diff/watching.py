"""Being told what a pipeline encodes and when its transformer runs, without changing either.

Called by everything that accompanies a pipeline call: capture, edits, guidance, analysis. It hides how calls
are intercepted (compiled or not, offloaded or not) and which rows of a batch belong to which picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

from torch import nn

Branch = Literal["conditional", "unconditional", "both"]

Before = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
After = Callable[[Any], Any]


@dataclass(frozen=True)
class EncodedPrompt:
    """What a pipeline call encoded.

    Attributes:
        texts: (CLIP text, T5 text) of every prompt; empty where embeddings were given.
        rows: number of pictures, which is the number of rows of one branch.
        text_length: number of text tokens.
        guided: whether classifier-free guidance doubles the batch: [unconditional; conditional].
    """

    texts: tuple[tuple[str, str], ...]
    rows: int
    text_length: int
    guided: bool

    def rows_of(self, branch: Branch, batch: int) -> slice:
        """The rows of a forward with ``batch`` rows that belong to a branch.

        Rows that perturbation guidance adds come after both branches and belong to neither. A forward without
        the unconditional half (a callback has cut it off) has conditional rows only.
        """
        if not self.guided or batch < 2 * self.rows:
            return slice(0, min(self.rows, batch))
        if branch == "both":
            return slice(0, 2 * self.rows)
        return slice(self.rows, 2 * self.rows) if branch == "conditional" else slice(0, self.rows)

    def text_of(self, picture: int, given: tuple[str, ...] | None = None) -> tuple[str, str]:
        """(CLIP text, T5 text) of a picture; several pictures of one prompt follow each other in the batch.

        Args:
            picture: number of the picture, from 0.
            given: what the caller says the prompts are, instead of what was encoded.

        Raises:
            RuntimeError: embeddings were given instead of text, and nothing else.
        """
        texts = self.texts if given is None else tuple((text, text) for text in given)
        if not texts:
            raise RuntimeError("no prompt is known (embeddings were given?); name it with prompt=")
        return texts[picture * len(texts) // self.rows]


@contextmanager
def watching_forwards(target: Any, before: Before, after: After) -> Iterator[None]:
    """Call ``before`` with the arguments of every forward of a transformer, and ``after`` with its output.

    ``before`` returns the arguments to use; ``after`` returns the output to use, or None to keep it. Neither
    is called from inside a compiled graph: a module that is compiled in place runs its hooks there, so its
    compiled call is wrapped instead.

    Args:
        target: a pipeline or a transformer, possibly behind the wrapper that ``torch.compile`` returns.
    """
    module = getattr(target, "transformer", target)
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = before(args, kwargs)
            output = compiled(*args, **kwargs)
            changed = after(output)
            return output if changed is None else changed

        module._compiled_call_impl = call
        try:
            yield
        finally:
            module._compiled_call_impl = compiled
        return

    # A copy of the module that was made inside the context has the same hooks, but is none of our business.
    def pre_hook(
        ran: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return before(args, kwargs) if ran is module else (args, kwargs)

    def hook(ran: nn.Module, _: Any, output: Any) -> Any:
        return after(output) if ran is module else None

    handles = [
        module.register_forward_pre_hook(pre_hook, with_kwargs=True),
        module.register_forward_hook(hook),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching_pipeline(
    pipe: Any, begin: Callable[[EncodedPrompt], object], end: Callable[[], object]
) -> Iterator[None]:
    """Call ``begin`` with what a pipeline call has encoded, and ``end`` when the call is over."""
    encode_prompt, free_hooks = pipe.encode_prompt, pipe.maybe_free_model_hooks
    signature = inspect.signature(encode_prompt)

    @wraps(encode_prompt)
    def watched_encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        output = encode_prompt(*args, **kwargs)
        begin(_encoded(given.arguments, output))
        return output

    @wraps(free_hooks)
    def watched_free_hooks(*args: Any, **kwargs: Any) -> Any:
        end()
        return free_hooks(*args, **kwargs)

    before = {name: pipe.__dict__.get(name) for name in ("encode_prompt", "maybe_free_model_hooks")}
    pipe.__dict__.update(encode_prompt=watched_encode_prompt, maybe_free_model_hooks=watched_free_hooks)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del pipe.__dict__[name]
            else:
                pipe.__dict__[name] = value


def _encoded(arguments: Mapping[str, Any], output: tuple[Any, ...]) -> EncodedPrompt:
    """What ``encode_prompt`` was given and returned: embeddings [rows, T, C], negative ones or None, ..."""

    def as_list(text: Any) -> list[str]:
        return [text] if isinstance(text, str) else list(text or ())

    clip = as_list(arguments.get("prompt"))
    t5 = as_list(arguments.get("prompt_3")) or clip
    guided = bool(arguments.get("do_classifier_free_guidance")) and output[1] is not None
    rows, text_length = output[0].shape[:2]
    texts = tuple(zip(clip, t5, strict=False))
    return EncodedPrompt(texts=texts, rows=rows, text_length=text_length, guided=guided)
