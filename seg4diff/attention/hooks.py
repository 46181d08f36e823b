"""Hooks on a pipeline: what it encodes, the end of its call, and each forward of its transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from seg4diff.backbones import Pipeline

Before = Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]
After = Callable[[Any], Any]


@contextmanager
def watching_forwards(target: Pipeline | nn.Module, before: Before, after: After) -> Iterator[None]:
    """Call `before` with the arguments of every forward of a transformer, and `after` with its output.

    `before` returns the arguments to use, all by name; `after` returns the output to use, or None to keep it.
    A transformer that is compiled runs them outside of the compiled graph, unless it is compiled within the
    context.

    Args:
        target: a pipeline or a transformer, possibly behind the wrapper that `torch.compile` returns.
        before: called before a forward.
        after: called after a forward.
    """
    module: Any = getattr(target, "transformer", target)
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:  # compiled in place: hooks would run inside of the graph

        def call(*args: Any, **kwargs: Any) -> Any:
            output = compiled(**before(args, kwargs))
            changed = after(output)
            return output if changed is None else changed

        module._compiled_call_impl = call
        try:
            yield
        finally:
            module._compiled_call_impl = compiled
        return

    # Copies of the module made inside the context share its hooks; ignore them.
    def pre_hook(
        ran: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((), before(args, kwargs)) if ran is module else (args, kwargs)

    def hook(ran: nn.Module, _: Any, output: Any) -> Any:
        return after(output) if ran is module else None

    handles = [
        module.register_forward_pre_hook(pre_hook, with_kwargs=True),
        # Before the hooks of contexts that are open, which see the output that they would have without this.
        module.register_forward_hook(hook, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching_pipeline(
    pipe: Pipeline,
    encoded: Callable[[Mapping[str, Any], tuple[Any, ...]], object],
    end: Callable[[], object],
) -> Iterator[None]:
    """Call `encoded` with the arguments and the output of every `encode_prompt`, and `end` after a call."""
    encode_prompt, free_hooks = pipe.encode_prompt, pipe.maybe_free_model_hooks
    signature = inspect.signature(encode_prompt)

    @wraps(encode_prompt)
    def watched_encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        # Some pipelines put every prompt of the list that they were given into a template, in place.
        arguments = {name: list(v) if isinstance(v, list) else v for name, v in given.arguments.items()}
        output = encode_prompt(*args, **kwargs)
        encoded(arguments, output)
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
