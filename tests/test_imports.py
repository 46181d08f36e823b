"""Imports run downward only, and no two modules import each other, however indirectly.

An import inside a function counts; one under `TYPE_CHECKING` does not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

FLOORS = (
    ("kernels",),
    ("files", "images", "masks", "metrics", "settings", "visualization"),
    ("jobs",),
    ("backbones",),
    ("demo",),
    ("loading",),
    ("data",),
    ("attention",),
    ("segmentation",),
    ("editing", "lora"),
    ("analysis", "training"),
    ("evaluation",),
    ("seg4diff",),  # `import seg4diff`, whose names come from the rooms below
    ("cli",),
    ("__main__",),
)
"""The files and folders of `seg4diff/`, from the bottom. A room may import those below, and itself."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """The modules of the package by their dotted names; `seg4diff/kernels` is a link to `kernels/`."""
    found = {}
    for folder, prefix in ((root / "seg4diff", "seg4diff"), (root / "kernels", "seg4diff.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix == "seg4diff" and parts[0] == "kernels":  # in case links are followed
                continue
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def imports(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules in `known` that a module imports, at its top or inside a function."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                found.add(submodule if submodule in known else origin)
    return (found & known) - {module}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield statement
                yield from _statements(statement)
        else:
            yield child
            yield from _statements(child)


def room_of(module: str) -> str:
    """The file or folder of `seg4diff/` that a module is in; `seg4diff` for the package itself."""
    return module.split(".")[:2][-1]


def upward(graph: dict[str, set[str]]) -> set[str]:
    """Imports of another room that is not below, as `"module -> module"`."""
    found = set()
    for module, targets in graph.items():
        for target in targets:
            here, there = room_of(module), room_of(target)
            if here != there and FLOOR_OF[here] <= FLOOR_OF[there]:
                found.add(f"{module} -> {target}")
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Chains of imports that come back to where they began, one per module at which a chain closes."""
    done: set[str] = set()
    found = []

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append([*chain[chain.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*chain, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def graph_of_the_library() -> dict[str, set[str]]:
    files = modules(ROOT)
    return {
        module: imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(files))
        for module, path in files.items()
    }


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module in modules(ROOT)}
    assert rooms == set(FLOOR_OF), "a new file or folder needs its floor, one that is gone leaves its floor"


def test_imports_run_downward() -> None:
    assert sorted(upward(graph_of_the_library())) == []


def test_no_modules_import_each_other() -> None:
    assert circles(graph_of_the_library()) == []


def test_what_counts_as_an_import() -> None:
    known = {"seg4diff", "seg4diff.files", "seg4diff.demo", "seg4diff.demo.scenes", "seg4diff.cli"}
    source = """
from typing import TYPE_CHECKING
import torch
from seg4diff.files import write_atomically
if TYPE_CHECKING:
    from seg4diff import cli
else:
    from seg4diff.demo import scenes
def later():
    try:
        import seg4diff
    finally:
        pass
"""
    assert imports(source, "seg4diff.x", False, known) == {
        "seg4diff.files",
        "seg4diff.demo.scenes",
        "seg4diff",
    }
    assert imports("from .scenes import scene", "seg4diff.demo", True, known) == {"seg4diff.demo.scenes"}
    assert imports("from . import scenes", "seg4diff.demo.train", False, known) == {"seg4diff.demo.scenes"}
    assert imports("from ..files import a", "seg4diff.demo.train", False, known) == {"seg4diff.files"}


def test_upward_imports_and_circles_are_found() -> None:
    graph = {"seg4diff.loading": {"seg4diff.attention.patch", "seg4diff.files"}, "seg4diff.files": set()}
    assert upward(graph) == {"seg4diff.loading -> seg4diff.attention.patch"}
    assert upward({"seg4diff.editing.blur": {"seg4diff.analysis"}}) == {
        "seg4diff.editing.blur -> seg4diff.analysis"
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
