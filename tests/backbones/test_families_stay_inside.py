"""Nothing outside of the model families names one, or what only one of them knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import seg4diff

ROOT = Path(seg4diff.__file__).parent
# The bundled model is one model, and tables of the paper name what they measured.
OWN = ("backbones/", "demo/", "kernels/", "evaluation/published.py")
KNOWLEDGE = re.compile(
    r"SD3\w*Transformer|StableDiffusion3|Flux\w*(?:Pipeline|Attn|Transformer)"  # a family
    r"|prompt_[2-9]|tokenizer_[2-9]|text_encoder_[2-9]"  # a slot of a pipeline
    r"|(?:slice\(0, |length[=:] ?|tokens[=:] ?|\(1, min\()(?:77|154|256|333|512)\b"  # a text length
    r"|\* ?1000(?:\.0)?\b|\b1000(?:\.0)? ?\*|/ ?1000(?:\.0)?\b"  # a timestep convention
)


def lines() -> list[tuple[str, int, str]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(OWN):
            text = path.read_text(encoding="utf-8").splitlines()
            found += [(name, number, line) for number, line in enumerate(text, start=1)]
    return found


def test_nothing_outside_names_a_family() -> None:
    found = [f"{name}:{number}: {line}" for name, number, line in lines() if KNOWLEDGE.search(line)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "SD3Transformer2DModel",
        "prompt_3=None",
        "pipe.text_encoder_3",
        "slice(0, 77)",
        "t=1000.0 * sigma",
    ],
)
def test_the_search_finds_them(line: str) -> None:
    assert KNOWLEDGE.search(line)
