"""`python -m benchmarks.real`: the bundled model on miniature data sets, interrupted and continued."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import real
from tests.support import miniature


@pytest.mark.slow
def test_one_command_measures_everything_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    miniature.write_voc(root)
    miniature.write_context(root, "59_context_labels")
    miniature.write_ade20k(root)
    words = ["--model", "demo", "--device", "cpu", "--data-root", str(root), "--partial", "--out", str(out)]

    def fails(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as interrupted:
        interrupted.setattr(real, "timed", fails)
        with pytest.raises(OSError, match="no space left"):
            real.main(words)
    assert not (out / "report.md").exists()
    lines = {path: path.read_text() for path in out.rglob("results-*.jsonl")}
    assert len(lines) == 3 * len(real.PRESETS) + len(real.variants())
    ranked = (out / "layers" / "ranking.json").stat().st_mtime_ns

    table = real.main(words).read_text()
    assert {path: path.read_text() for path in out.rglob("results-*.jsonl")} == lines
    assert (out / "layers" / "ranking.json").stat().st_mtime_ns == ranked
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"
    ]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["`paper`, Pascal VOC 20"][0] == "2 of 1449"
    assert cells["`paper`, Pascal VOC 20"][-1] == "89.2"
    assert cells["`best`, ADE20K-150"][0] == "1 of 2000"
    assert cells["`default` + presence, Pascal VOC 20"][0] == "2 of 1449"
    assert all(float(cells[f"`{preset}`"][0]) > 0 < float(cells[f"`{preset}`"][1]) for preset in real.PRESETS)
    assert {str(layer) for layer in range(6)} <= cells.keys()
    assert "Layers read: [2]" in table
    assert "Steps of" in capsys.readouterr().out
