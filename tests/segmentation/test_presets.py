"""Presets: every choice is an attribute, and no code compares a preset's name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import pytest

from seg4diff.segmentation.presets import PRESETS, Grouping, PresetName, find_preset
from tests.support.paths import ROOT


def test_a_threshold_replaces_that_of_the_preset() -> None:
    assert find_preset("paper") is PRESETS["paper"]
    paper = find_preset("paper", threshold=2)
    assert paper == replace(PRESETS["paper"], grouping=Grouping(threshold=2))
    assert find_preset("reference", threshold=2).grouping == Grouping(threshold=2, overlapping=True)
    assert PRESETS["paper"].grouping.threshold == 0.035


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), True, "1"])
def test_a_bad_threshold_is_named(threshold: Any) -> None:
    with pytest.raises(ValueError, match=f"threshold={threshold!r} must be a number above 0"):
        find_preset("default", threshold=threshold)


def test_an_unknown_preset_is_named() -> None:
    accepted = "accepted: 'default', 'best', 'fast', 'paper', 'reference'"
    with pytest.raises(ValueError, match=f"'finest' is unknown; {accepted}"):
        find_preset("finest")


def test_presets_load_without_torch() -> None:
    check = "import sys; import seg4diff.segmentation.presets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def uses_of_names(source: str) -> list[int]:
    """Lines that compare a preset or its name with something, or list the names of the presets again."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Compare, ast.Match)):
            operands = [node.subject] if isinstance(node, ast.Match) else [node.left, *node.comparators]
            bad = any(re.fullmatch(r"(.*\.)?preset(\.name)?", ast.unparse(operand)) for operand in operands)
        elif isinstance(node, (ast.Dict, ast.Tuple)):
            names = node.keys if isinstance(node, ast.Dict) else node.elts
            bad = {name.value for name in names if isinstance(name, ast.Constant)} >= PRESETS.keys()
        else:
            continue
        if bad:
            found.append(node.lineno)
    return found


def test_no_code_compares_a_presets_name() -> None:
    assert uses_of_names("x = preset.name != 'best'") == [1]
    assert uses_of_names("\nif self.preset in ('paper', 'reference'):\n    pass") == [2]
    assert uses_of_names("match options.preset:\n    case 'paper': pass") == [1]
    assert uses_of_names("preset: Literal['paper', 'reference', 'fast', 'default', 'best'] = 'paper'") == [1]
    assert uses_of_names("GROUPINGS = {'paper': 1, 'reference': 2, 'default': 3, 'best': 4, 'fast': 5}") == [
        1
    ]
    assert get_args(PresetName) == tuple(PRESETS)
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "seg4diff").rglob("*.py"))
        # The presets' own file has their names for type checkers.
        if path.name != "presets.py"
        and "training" not in path.parts  # has presets of its own, for training and for its focal loss
        for line in uses_of_names(path.read_text(encoding="utf-8"))
    ]
    assert found == []
