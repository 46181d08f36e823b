"""The package as users get it: wheel, source distribution, editable installs, and what an import loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def run(*words: str | Path, cwd: Path) -> str:
    """The output of a command that has to succeed, run without this repository on its path."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))
    }
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is built, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("source") / "seg4diff"
    folder.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("seg4diff", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """Folder with a wheel and a source distribution."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--sdist",
        "--outdir",
        out,
        source,
        cwd=out,
    )
    return out


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_link_is_what_makes_kernels_a_part_of_the_package():
    link = ROOT / "seg4diff" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow another project's package


def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"seg4diff", only(built, "*.whl").name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    kinds = {Path(name).suffix for name in names if name.startswith("seg4diff/")}
    weights = ROOT / "seg4diff" / "demo" / "weights"
    vocabularies = ROOT / "seg4diff" / "data" / "vocabularies"
    files = (*weights.rglob("*"), *vocabularies.glob("*.txt"))
    expected = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    assert {
        "seg4diff/py.typed",
        "seg4diff/kernels/api.py",
        "seg4diff/kernels/aten/backend.py",
    } | expected <= names
    assert kinds - {Path(name).suffix for name in expected} <= {".py", ".typed", ""}
    assert not [name for name in names if "__pycache__" in name]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    for extra in ("train", "eval", "viz", "demo", "quant", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "seg4diff = seg4diff.cli.main:main" in entry_points


def test_source_distribution_holds_what_it_takes_to_build(built):
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md", "seg4diff/kernels/api.py"} <= names


PROBE = """
import importlib.util, os, sys
if sys.argv[1] == "fake":
    import kernels
    assert kernels.get_kernel == "of another project", kernels
else:
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None, found  # at most a folder without code
if sys.argv[2] == "import":
    import seg4diff.kernels.api
    assert callable(seg4diff.kernels.api.joint_attention)
    assert "kernels.api" not in sys.modules
print(os.path.realpath(importlib.util.find_spec("seg4diff.kernels.api").origin))
"""


@pytest.mark.parametrize(
    "kind",
    ["wheel", *(pytest.param(k, marks=pytest.mark.slow) for k in ("sdist", "editable", "editable compat"))],
)
def test_installed_package_imports_from_everywhere(kind, source, built, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    inside = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # The packages of the environment that runs this test, but not its .pth files: no other seg4diff.
    (inside / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    target: list[str | Path]
    if kind == "wheel":
        target = [only(built, "*.whl")]
    elif kind == "sdist":
        target = [only(built, "*.tar.gz")]
    else:
        source = shutil.copytree(source, tmp_path / "checkout", symlinks=True)
        target = ["--editable", source]
        if kind == "editable compat":
            target = ["--config-settings", "editable_mode=compat", *target]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--ignore-installed", "--no-build-isolation", *target, cwd=tmp_path)
    expected = source if kind.startswith("editable") else inside

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for fake in ("no fake", "fake"):
        if fake == "fake":
            (inside / "kernels").mkdir()
            (inside / "kernels" / "__init__.py").write_text("get_kernel = 'of another project'\n")
        for cwd in (elsewhere, source):
            # From the root of a checkout its own seg4diff/ comes first, as everywhere in Python.
            action = "import" if (fake, cwd) == ("fake", elsewhere) else "find"
            found = Path(run(python, "-c", PROBE, fake, action, cwd=cwd).strip())
            assert found.is_relative_to((expected if cwd == elsewhere else source).resolve()), (fake, cwd)
    assert "usage: seg4diff" in run(venv / "bin" / "seg4diff", "--help", cwd=elsewhere)


def test_import_is_light():
    code = (
        "import sys, seg4diff, seg4diff.demo, seg4diff.cli.main\n"
        "heavy = {'diffusers', 'transformers', 'triton', 'peft', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'patch', 'segment', 'capture'} <= set(dir(seg4diff))\n"
        "assert dir(seg4diff) == sorted([*seg4diff.__all__, '__version__'])\n"
    )
    run(sys.executable, "-c", code, cwd=ROOT)


def test_without_triton_all_but_its_backend_runs():
    code = (
        "import sys, seg4diff\n"
        "sys.modules['triton'] = None  # importing it raises ImportError, as where it is not installed\n"
        "from seg4diff.demo import HELD_OUT, scene\n"
        "from seg4diff.kernels.api import backend\n"
        "pipe, item = seg4diff.load_pipeline('demo', 'cpu'), scene(HELD_OUT)\n"
        "result = seg4diff.segment(pipe, item.image, item.classes)\n"
        "assert (result.labels.numpy() == item.labels).mean() > 0.8\n"
        "with backend('triton'):\n"
        "    try:\n"
        "        seg4diff.segment(pipe, item.image, item.classes)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    message = run(sys.executable, "-c", code, cwd=ROOT)
    assert "None in sys.modules; torch for CUDA or ROCm installs Triton" in message
    assert 'backend("aten") can' in message


def test_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    import seg4diff

    assert seg4diff.__version__ == version("seg4diff")
    with pytest.raises(AttributeError, match="absent"):
        seg4diff.absent  # noqa: B018
