"""README and docs: examples run and type-check, commands parse, links and the model table are right."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import seg4diff
from seg4diff import backbones
from seg4diff.demo import HELD_OUT, scene
from tests.support import tiny
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
TYPING = ROOT / "tests" / "typing"
STAND_INS = {'.to("cuda")': ""}
"""Text of examples that is replaced before they run. Besides, `StableDiffusion3Pipeline.from_pretrained`
gives a random pipeline of 24 small layers, and their folder has an image of every name in `IMAGES`."""
IMAGES = ("kitchen.jpg",)
BEFORE = {
    "kernels": """
import torch
from seg4diff.kernels.api import attention_maps, key_average
query, shard_of_keys, text_key = (torch.randn(1, tokens, 2, 8) for tokens in (6, 6, 4))
gathered = [key_average(query, shard_of_keys)[1]]
"""
}
"""What a page's blocks take for granted, by the page's name."""


def ids(page: Path) -> str:
    return page.stem


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline(page: Path) -> list[str]:
    """What stands between backticks outside of fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\s+", " ", found) for found in re.findall(r"`([^`]+)`", text)]


def program(page: Path) -> str:
    """The Python blocks of a page, which follow each other as in a notebook."""
    return "\n".join([BEFORE.get(page.stem, ""), *blocks(page, "python")])


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=ids)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.chdir(tmp_path)
    for name in IMAGES:
        scene(HELD_OUT).image.save(name)
    model = tiny.pipeline(layers=24)
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: model)
    source = program(page)
    for text, replacement in STAND_INS.items():
        source = source.replace(text, replacement)
    namespace: dict[str, Any] = {}
    exec(compile(source, str(page), "exec"), namespace)
    if page.stem == "README":
        with Image.open("kitchen.png") as saved:
            assert saved.size == scene(HELD_OUT).image.size
        assert namespace["result"].classes == ("cat", "sofa", "wall")
        assert namespace["heat"].shape == (64, 64)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every page's Python blocks as a file, and what `tests/typing` adds."""
    folder = tmp_path_factory.mktemp("calls")
    for page in WITH_PYTHON:
        (folder / f"{page.stem.lower()}_example.py").write_text(program(page))
    for file in TYPING.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def check(folder: Path, *words: str) -> None:
    environment = {**os.environ, "MYPYPATH": str(ROOT), "PYRIGHT_PYTHON_GLOBAL_NODE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.extra("lint", "mypy")
def test_calls_pass_mypy(calls: Path) -> None:
    # What `import diffusers` gives without torch comes first there, and mypy takes it for the whole.
    (calls / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\n[mypy-diffusers]\nfollow_imports = skip\n"
    )
    check(calls, "mypy", "--config-file", "mypy.ini", "--python-executable", sys.executable, ".")


@pytest.mark.slow
@pytest.mark.extra("lint", "pyright")
@pytest.mark.parametrize("annotations", ["stubs", "diffusers"])
def test_calls_pass_pyright(annotations: str, calls: Path) -> None:
    """Strictly, but with stubs for diffusers where its own functions are called: they are partly untyped."""
    with_diffusers = ["pipelines.py"]
    stubs = {"stubPath": str(TYPING / "stubs"), "exclude": with_diffusers}
    configuration = {
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": "error",
        "extraPaths": [str(ROOT)],
        **(stubs if annotations == "stubs" else {"include": with_diffusers}),
    }
    (calls / "pyrightconfig.json").write_text(json.dumps(configuration))
    check(calls, "pyright", "--pythonpath", sys.executable)


def parsed(words: list[str]) -> Any:
    """What the command line makes of the words after `seg4diff`, without running it."""
    from seg4diff.cli.main import parse

    return parse(words)


def shell_lines(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.mark.parametrize("page", PROSE, ids=ids)
def test_shell_lines_parse(page: Path) -> None:
    for words in shell_lines(page):
        if words[0] == "seg4diff":
            try:
                parsed(words[1:])
            except SystemExit as stopped:
                pytest.fail(f"{page.name}: {shlex.join(words)} ends with {stopped.code}")


@pytest.mark.parametrize("page", PROSE, ids=ids)
def test_commands_that_are_named_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    for words in [*shell_lines(page), *(code.split() for code in inline(page))]:
        match words:
            case ["make", target, *_] if target.islower():
                assert target in targets, f"{page.name}: make {target}"
            case ["seg4diff", verb, *_] if not verb.startswith("-"):
                with pytest.raises(SystemExit):
                    parsed([verb, "--help"])  # an unknown verb gets the help of the whole
                assert f"usage: seg4diff {verb} " in capsys.readouterr().out, f"{page.name}: seg4diff {verb}"
            case ["python", "-m", module, *_] if module.startswith("benchmarks."):
                assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{page.name}: {module}"
            case ["pytest" | "python", file, *_] if file.endswith(".py"):
                assert (ROOT / file).is_file(), f"{page.name}: {file}"


@pytest.mark.parametrize("page", PROSE, ids=ids)
def test_names_of_the_library_exist(page: Path) -> None:
    names = {found.group() for code in inline(page) if (found := re.match(r"seg4diff(\.\w+)+", code))}
    for name in names:
        parts = name.split(".")
        found: Any = seg4diff
        for depth, part in enumerate(parts[1:], start=2):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(".".join(parts[:depth]))


def anchors(page: Path) -> set[str]:
    """The anchors that headings of a page get on common hosts of Markdown."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PROSE, ids=ids)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def models() -> Any:
    """`docs/models.py`, which writes the tables of models."""
    specification = importlib.util.spec_from_file_location("docs_models", ROOT / "docs" / "models.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_model_table_is_that_of_the_families() -> None:
    shown = models().TABLE.search(PAGES[0].read_text("utf-8"))
    assert shown is not None
    assert shown.group() == models().readme_table(), "run `python docs/models.py`"


def test_page_of_models_is_that_of_the_families() -> None:
    import diffusers

    shown = (ROOT / "docs" / "models.md").read_text("utf-8")
    if f"diffusers {diffusers.__version__};" not in shown:
        pytest.skip("the page lists the pipelines of another diffusers")
    assert shown == models().page(), "run `python docs/models.py`"
    for family in backbones.families():
        assert f"`{family.pipeline}`" in shown


def test_version_of_the_citation() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert version is not None
    assert f"version: {version.group(1)}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"version = {{{version.group(1)}}}" in PAGES[0].read_text("utf-8")
