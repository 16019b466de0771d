"""results/make.py: every row parses; rows are trained in pieces, and once."""

import importlib.util
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import recipes
from lab.commandline import parse_arguments
from lab.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("make_results", ROOT / "results" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.mark.parametrize("photographs", ["", "data/my pictures"])
@pytest.mark.parametrize(("short", "epochs"), [(False, 0), (False, 3), (True, 0)])
def test_rows_are_settings_of_train(photographs, short, epochs):
    for name, options in make.rows(photographs, "data", short, epochs).items():
        config = recipes.resolve(parse_arguments(TrainConfig, options, prog="", about=""))
        assert name.removeprefix("short-").startswith(config.model)
        if short:
            assert (config.epochs, config.limit_train) == (3, 5000)
        if epochs:
            assert (config.epochs, config.limit_train) == (epochs, 0)
        if config.dataset == "folder":
            assert config.data_dir == photographs


@pytest.mark.slow
def test_rows_are_trained_in_pieces_and_once(tmp_path, monkeypatch, capsys):
    options = ["--dataset", "digits", "--epochs", "8", "--threads", "1", "--limit-train", "200"]
    monkeypatch.setattr(make, "rows", lambda *_: {"first": options, "second": options})
    monkeypatch.chdir(tmp_path)
    kept, runs = tmp_path / "kept", tmp_path / "runs"
    words = ["--output", str(kept), "--runs", str(runs)]

    assert make.main([*words, "--minutes", "0"]) == 0
    assert "left, for the next calls: first, second" in capsys.readouterr().out
    assert not runs.exists()

    # A piece too short for all epochs is stopped, and another goes on with it.
    assert make.train("first", options, runs, kept, seconds=0.01) == 0
    assert not (kept / "first").exists()
    stopped = len((runs / "first" / "history.jsonl").read_text().splitlines())
    assert stopped < 8
    assert make.main([*words, "--only", "first"]) == 0
    history = (kept / "first" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == list(range(1, 9))
    assert {file.name for file in (kept / "first").iterdir()} == {*make.KEPT, "log.txt"}
    assert (kept / "first" / "log.txt").read_text().count("$ python train.py ") == 2

    assert (runs / "comparison" / "comparison.md").exists()

    before = (runs / "first.log").read_text()
    monkeypatch.setattr(make, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(make.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    assert make.main([*words, "--only", "first"]) == 0
    assert (runs / "first.log").read_text() == before
    with pytest.raises(SystemExit):
        make.main([*words, "--only", "third"])


def rows_of(page: Path) -> list[tuple[str, str, str]]:
    """Of each row that names a folder of results/: accuracy, macro-F1, the folder."""
    number = r"(0\.\d{4})(?: \([^|`]*\))? \| (0\.\d{4}) "
    found = [re.search(number + r".*?`([^`]+)`", line) for line in page.read_text().splitlines()]
    pairs = r"(0\.\d{4}), (0\.\d{4}) \(`([^`]+)`\)"
    return [m.groups() for m in found if m] + re.findall(pairs, page.read_text())


@pytest.mark.parametrize(("page", "least"), [("README.md", 4), ("docs/architectures.md", 12)])
def test_the_rows_of_pages_are_those_of_their_folders(page, least):
    rows = rows_of(ROOT / page)
    assert len(rows) >= least
    for accuracy, macro_f1, folder in rows:
        reports = [json.loads(p.read_text()) for p in ROOT.glob(f"results/{folder}/report.json")]
        assert reports, folder
        for text, key in ((accuracy, "accuracy"), (macro_f1, "macro_f1")):
            assert text == f"{statistics.mean(r[key] for r in reports):.4f}", (folder, key)
