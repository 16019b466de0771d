"""docs/notebook.ipynb runs from its first cell to its last."""

import json
import os

import pytest
from worlds import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

# PyTorch threads do not survive a fork: forked processes must not wait for them.
COMPUTES = """
import torch
torch.set_num_threads(2)
torch.randn(600, 600) @ torch.randn(600, 600)
"""


def test_the_notebook_runs_after_a_cell_that_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # more than one on a machine of one core too
    book = nbformat.read(ROOT / "docs" / "notebook.ipynb", 4)
    assert not any(cell.get("outputs") for cell in book.cells)
    book.cells.insert(0, nbformat.v4.new_code_cell(COMPUTES))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=100, resources=resources).execute()  # raises as cells do
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    sizes = [json.loads((run / "config.json").read_text())["world_size"] for run in (one, two)]
    assert sizes == [1, 2]
    losses = [
        [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    printed = "".join(
        output.get("text", "") for cell in book.cells for output in cell.get("outputs", ())
    )
    assert "2 x cpu" in printed  # printed by a forked process
    assert "unknown option --epoch. Did you mean --epochs?" in printed
    assert os.fspath(one.relative_to(tmp_path)) in printed
