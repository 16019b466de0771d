"""P3: runs on a small disk, mounted for the test, that becomes full."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from lab.checkpoint import manager, run_dir, train_state
from lab.errors import UserError


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def small_disk(tmp_path):
    """Return a directory on a disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.getuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small disk takes Linux and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Return a new file that takes all the free space of a disk."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return path


def test_p3_a_run_continues_when_the_disk_is_full(small_disk, tmp_path, monkeypatch, capsys):
    words = ["--dataset", "digits", "--recipe", "smoke", "--name", "run", "--quiet"]
    words += ["--threads", "1", "--checkpoint-every", "4", "--log-every", "1"]
    train.main([*words, "--output-dir", str(tmp_path)])
    write, calls = train_state.write_checkpoint, []

    def on_a_full_disk(folder, *content):
        calls.append(folder.name)
        if len(calls) != 3:
            return write(folder, *content)
        filler = fill(small_disk)
        try:
            return write(folder, *content)
        finally:
            filler.unlink()

    monkeypatch.setattr(manager, "write_checkpoint", on_a_full_disk)
    capsys.readouterr()
    assert train.main([*words, "--output-dir", str(small_disk)]).exit_code == 0
    [warning] = capsys.readouterr().err.splitlines()
    assert f"{calls[2]} is not written: cannot write" in warning
    assert "No space left on device" in warning
    assert [f.name for f in run_dir.RunDir(small_disk / "run").checkpoints] == calls[:-3:-1]
    for name in ("best.safetensors", "predictions.csv", "report.json", "steps.jsonl"):
        assert (small_disk / "run" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_p3_a_full_disk_leaves_no_incomplete_line(small_disk):
    run = run_dir.RunDir(small_disk)
    run.add_steps({"step": 0})
    filler = fill(small_disk)
    rows = [{"step": step} for step in range(1, 1000)]
    with pytest.raises(UserError, match="No space left on device"):
        run.add_steps(*rows)
    assert lines(small_disk / "steps.jsonl") == [{"step": 0}]
    filler.unlink()
    run.add_steps(*rows)
    assert lines(small_disk / "steps.jsonl") == [{"step": 0}, *rows]
