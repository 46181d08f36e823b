"""The four events that everything around a pipeline call is made of, and the one way to attach to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seg4diff.attention.hooks import watching_forwards, watching_pipeline
from seg4diff.attention.patch import Patch, patch_of
from seg4diff.attention.requests import LayerRequest, LayerResult
from seg4diff.backbones import EncodedText, Pipeline, TransformerCall

Branch = Literal["conditional", "unconditional", "both"]


@dataclass(frozen=True, eq=False)
class PromptCall:
    """What a pipeline call encoded.

    Attributes:
        conditional: the prompt.
        unconditional: embeddings of the negative prompt where that branch has forwards of its own; else None.
        steps: number of denoising steps of the call; None where the pipeline does not tell.
    """

    conditional: EncodedText
    unconditional: Tensor | None = None
    steps: int | None = None

    @property
    def images(self) -> int:
        """Number of images, which is the number of rows of one branch."""
        return len(self.conditional.embeddings)

    @property
    def text_tokens(self) -> int:
        """Length of the text stream."""
        return self.conditional.embeddings.shape[1]

    def text_of(self, image: int, given: Sequence[str] | None = None) -> Mapping[str, str]:
        """The text of an image by text encoder; several images of one prompt follow each other in the batch.

        Args:
            image: number of the image, from 0.
            given: what the caller says the prompts are, instead of what was encoded.

        Raises:
            RuntimeError: embeddings were given instead of text, and nothing else.
        """
        if given is not None:
            return SameText(given[image * len(given) // self.images])
        texts = self.conditional.texts
        if not texts:
            raise RuntimeError("no prompt is known (embeddings were given?); name it with prompt=")
        return texts[image * len(texts) // self.images]


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward of the transformer.

    Attributes:
        call: what it was given.
        prompt: what the pipeline call it belongs to encoded; None for a call of the transformer alone.
        step: number of the denoising step in its pipeline call, from 0; 0 where there is none.
    """

    call: TransformerCall
    prompt: PromptCall | None
    step: int = 0

    @property
    def unconditional(self) -> bool:
        """Whether all rows are of the unconditional branch, which then has forwards of its own."""
        if self.prompt is None or self.prompt.unconditional is None:
            return False
        return _closest(self.call.text, self.prompt.conditional.embeddings, self.prompt.unconditional) == 1

    def rows(self, branch: Branch) -> slice:
        """The rows of the forward that belong to a branch; empty where it has none.

        Rows that perturbation guidance adds come after those of the pipeline and belong to no branch. A
        forward without the unconditional half (a callback has cut it off) has conditional rows only.
        """
        batch = self.call.batch
        if self.prompt is None:
            return slice(0, batch)
        images = self.prompt.images
        if self.prompt.unconditional is not None:
            wanted = branch == "both" or (branch == "unconditional") == self.unconditional
            return slice(0, min(images, batch) if wanted else 0)
        if not self.prompt.conditional.guided or batch < 2 * images:
            return slice(0, min(images, batch))
        if branch == "both":
            return slice(0, 2 * images)
        first = (branch == "conditional") == self.prompt.conditional.conditional_first
        return slice(0, images) if first else slice(images, 2 * images)


class Observer:
    """What a capability does at the four events; each method does nothing unless overridden."""

    def begin_call(self, prompt: PromptCall) -> None:
        """A pipeline call has encoded its prompt, and its first forward is about to run."""

    def before_forward(self, forward: Forward, arguments: dict[str, Any]) -> dict[str, Any]:
        """A forward is about to run; returns the arguments to use."""
        return arguments

    def after_forward(self, forward: Forward, results: Mapping[int, LayerResult], output: Any) -> Any:
        """A forward has ended, with the results of every layer asked; returns its output, None to keep it."""
        return None

    def end_call(self) -> None:
        """The pipeline call is over."""

    def compiled_forward(self, call: TransformerCall, results: Mapping[int, LayerResult]) -> None:
        """In place of the other events where the transformer is compiled within the context.

        Runs inside of the graph: it may set attributes and do nothing that depends on values.

        Raises:
            RuntimeError: the capability needs events that a graph cannot have.
        """
        raise RuntimeError(
            "the transformer was compiled within the context; call torch.compile before opening the context"
        )


@contextmanager
def attach(
    target: Pipeline | nn.Module,
    layers: tuple[int, ...],
    request: LayerRequest,
    observer: Observer | None = None,
    *,
    stop_early: bool = False,
) -> Iterator[Patch]:
    """Ask `request` of `layers` and tell `observer` what happens, for the length of the context.

    Args:
        target: a pipeline or a transformer, possibly compiled.
        layers: ascending numbers of layers.
        request: what to ask of each.
        observer: what to tell.
        stop_early: leave out everything that the last of `layers` does not need for its answer.
    """
    state = patch_of(target)
    attachment = _Attachment(target, state, request, Observer() if observer is None else observer)
    with ExitStack() as stack:
        stack.enter_context(state.asking(layers, request, stop_early=stop_early))
        stack.enter_context(watching_forwards(target, attachment.before, attachment.after))
        if not isinstance(target, nn.Module):
            stack.enter_context(watching_pipeline(target, attachment.encoded, attachment.end))
        yield state


class _Attachment:
    """Turns what hooks report into an observer's events."""

    def __init__(self, target: Any, state: Patch, request: LayerRequest, observer: Observer) -> None:
        self._target = target
        self._state = state
        self._request = request
        self._observer = observer
        self._waiting: list[EncodedText] = []  # encoded since the latest forward or end of a call
        self._prompt: PromptCall | None = None
        self._step = -1
        self._call: TransformerCall | None = None
        self._forward: Forward | None = None

    def encoded(self, arguments: Mapping[str, Any], output: tuple[Any, ...]) -> None:
        self._waiting.append(self._state.backbone.read_encoded(arguments, output))

    def end(self) -> None:
        self._waiting.clear()
        self._prompt = None
        self._observer.end_call()

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        state = self._state
        arguments = state.backbone.named(state.transformer, args, kwargs)
        call = state.backbone.read_call(state.transformer, arguments)
        state.begin_forward(call)
        self._call, self._forward = call, None
        if torch.compiler.is_compiling():
            return arguments
        if self._waiting:
            self._prompt, self._step = self._begin(call), -1
            self._observer.begin_call(self._prompt)
        if self._prompt is None:
            self._forward = Forward(call, None)
        else:
            # Skip-layer guidance and the unconditional branch make further forwards in a step.
            if not call.skipped_layers and not Forward(call, self._prompt).unconditional:
                self._step += 1
            self._forward = Forward(call, self._prompt, max(self._step, 0))
        return self._observer.before_forward(self._forward, arguments)

    def after(self, output: Any) -> Any:
        call = self._call
        if call is None:
            return None
        results = self._state.results(self._request)
        if torch.compiler.is_compiling():
            self._observer.compiled_forward(call, results)
            return None
        forward, self._forward, self._call = self._forward, None, None
        return None if forward is None else self._observer.after_forward(forward, results, output)

    def _begin(self, call: TransformerCall) -> PromptCall:
        """The prompt of the pipeline call whose first forward this is; it is the conditional one."""
        waiting, self._waiting = self._waiting, []
        steps = getattr(self._target, "num_timesteps", None)  # set before the first forward of a call
        unconditional = waiting[-1].unconditional
        alone = self._state.backbone.guidance == "one forward" or len(waiting) == 1
        if alone or unconditional is not None:
            return PromptCall(_repeated(waiting[-1], call.batch), unconditional, steps)
        if _closest(call.text, waiting[-2].embeddings, waiting[-1].embeddings) == 1:
            # The others are of a call that failed before its first forward.
            return PromptCall(waiting[-1], steps=steps)
        return PromptCall(waiting[-2], waiting[-1].embeddings, steps)


def _repeated(encoded: EncodedText, batch: int) -> EncodedText:
    """`encoded` for every image where the pipeline repeats it for the images of one prompt."""
    if not encoded.conditional_first:
        return encoded
    repeats = batch // ((2 if encoded.guided else 1) * len(encoded.embeddings))
    embeddings = encoded.embeddings.repeat_interleave(repeats, dim=0)
    return replace(encoded, embeddings=embeddings, repeats=repeats)


class SameText(dict[str, str]):
    """One text for every encoder."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __missing__(self, encoder: str) -> str:
        return self.text

    def values(self) -> Any:
        return (self.text,)


def _closest(text: Tensor, *candidates: Tensor) -> int:
    """Which of the candidates `text` is: the very tensor, else a copy of it; 0 if it is none of them."""
    for number, candidate in enumerate(candidates):
        if text.data_ptr() == candidate.data_ptr():
            return number
    for number, candidate in enumerate(candidates):  # pipelines may cast or move what they have encoded
        if text.shape == candidate.shape and torch.equal(text.to(candidate), candidate):
            return number
    return 0
