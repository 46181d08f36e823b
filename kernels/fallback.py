"""A kernel that cannot be built on the machine at hand is replaced, once and for all, with a warning.

Only a failed compilation and a lack of a multiprocessor's resources count. Any other error of CUDA may have
left wrong numbers behind and is raised.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .types import Inputs

Result = TypeVar("Result")

log = logging.getLogger(__name__)

chosen = "auto"
"""The backend that :func:`seg4diff.kernels.api.backend` forces. torch.compile guards on it: a graph is traced
again under another choice."""

FAILED: dict[tuple[str, torch.device, torch.dtype, int], str] = {}
"""What is not tried again in this process: provider and direction, device, dtype and head dim; and why."""

# Of errors without a class of their own: Triton's compiler, its search for tools, and cuDNN's for a plan.
_MESSAGES = (
    "PassManager::run failed",
    "Failed to find C compiler",
    "Cannot find ptxas",
    "No valid execution plans",
    "No execution plans support",
)


def is_failed_build(error: BaseException) -> bool:
    """Whether a kernel could not be compiled, or needs more shared memory or registers than there are."""
    if isinstance(error, subprocess.CalledProcessError):  # of the C compiler, for what launches a kernel
        return True
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        pass
    else:
        if isinstance(error, (CompilationError, OutOfResources, PTXASError)):
            return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def query_of(args: tuple[Any, ...]) -> Tensor:
    """What tells device, dtype and head dim of a call: the query of its inputs, or else its first tensor."""
    inputs = next((a for a in args if isinstance(a, Inputs)), None)
    return next(a for a in args if isinstance(a, Tensor)) if inputs is None else inputs.query


def falling_back(
    name: str, part: str, run: Callable[..., Result], instead: Callable[..., Result]
) -> Callable[..., Result]:
    """``run``, or ``instead`` with the same arguments once ``run`` failed to build for such tensors.

    The first time, a warning names what failed. Nothing is replaced while ``name`` is forced.

    Args:
        name: of the provider.
        part: which function of a backend it is, such as ``"forward"``.
        run, instead: the provider's and another's.
    """

    def guarded(*args: Any, **options: Any) -> Result:
        if chosen == name:
            return run(*args, **options)
        like = query_of(args)
        key = (f"{name} {part}", like.device, like.dtype, like.shape[-1])
        if key not in FAILED:
            try:
                return run(*args, **options)
            except Exception as error:
                if not is_failed_build(error):
                    raise
                FAILED[key] = f"{type(error).__name__}: {error}"
                log.warning(
                    "%s could not be built for %s, %s, head dim %d (%s); another provider computes it in "
                    'this process. backend("%s") raises the error',
                    *key, FAILED[key], name,
                )  # fmt: skip
        return instead(*args, **options)

    return guarded
