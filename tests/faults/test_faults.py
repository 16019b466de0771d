"""P3: the process, machine or disk fails between any two file operations of a save."""

import io
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from dying import Fault
from mistakes import tree

from lab.checkpoint import manager, run_dir, train_state
from lab.checkpoint import weights as weights_module
from lab.config.recipes import resolve
from lab.errors import UserError

CONFIG = resolve({"dataset": "digits", "recipe": "smoke", "epochs": 9, "keep_checkpoints": 2})
MAX_OPERATIONS = 100  # a save takes fewer
DEATHS = pytest.mark.parametrize("power", [False, True], ids=["killed", "power-cut"])


def metadata(step: int) -> dict:
    state = dict.fromkeys(train_state.TRAIN_STATE_TYPES, 0) | {"epoch": step // 10, "step": step}
    return {"format": train_state.CHECKPOINT_FORMAT, "train_state": state, "best": {},
            "totals": [[0.0, 0.0, 0.0]], "config": asdict(CONFIG), "fingerprints": {},
            "normalization": [[0.5], [0.5]], "precision": "no", "scaler": None}  # fmt: skip


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((1000,), float(step))}


def save(run: run_dir.RunDir, step: int) -> None:
    """Write the checkpoint of `step` as the manager does in its background thread."""
    model = SimpleNamespace(named_parameters=list)  # without parameters
    train_step = SimpleNamespace(config=CONFIG, model=model)
    manager.CheckpointManager._write(
        SimpleNamespace(run=run, train_step=train_step), tensors(step), metadata(step)
    )


def row(epoch: int) -> dict:
    return {"epoch": epoch, "val_accuracy": epoch / 10, "val_loss": 1.0}


@pytest.fixture
def run(tmp_path):
    """Return a run with checkpoints of steps 10 and 20, and lines of epochs 1 to 3."""
    run = run_dir.RunDir(tmp_path / "run")
    run.checkpoints_dir.mkdir(parents=True)
    run.create({})
    run.add_epoch(*map(row, (1, 2, 3)))
    run.add_steps(*({"step": step} for step in range(1, 31)))
    save(run, 10)
    save(run, 20)
    return run


def latest(run: run_dir.RunDir) -> train_state.Checkpoint:
    """Return the checkpoint that --resume loads."""
    config = replace(CONFIG, resume=str(run.path))
    with manager.open_run(config, {}, PartialState(cpu=True)) as (_, _, checkpoint):
        return checkpoint


def every_fault(run, tmp_path, work, check, **fault):
    """Call `work(run)` with the n-th operation failing, for each n, and then `check(run, fault)`.

    Return the number of operations.
    """
    for n in range(1, MAX_OPERATIONS):
        copy = run_dir.RunDir(tmp_path / f"{n}" / "run")
        shutil.copytree(run.path, copy.path)
        with Fault(copy.path, n, **fault) as injected:
            injected.attempt(lambda copy=copy: work(copy))
        check(copy, injected)
        if not injected.struck:
            return n - 1
    raise AssertionError("more operations than expected")


def lines(path: Path) -> list[dict]:
    content = path.read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def check_checkpoints(run: run_dir.RunDir, steps: tuple[int, ...]) -> int:
    """Check that all checkpoints are complete and of `steps`; return the newest step."""
    present = [int(path.name[5:]) for path in run.checkpoints]
    assert set(present) <= set(steps)
    assert latest(run).metadata["train_state"]["step"] == present[0]
    for step in present:
        read, values = train_state.read_checkpoint(run.checkpoints_dir / f"step-{step:08}")
        assert read["train_state"]["step"] == step
        assert torch.equal(values["model.weight"], tensors(step)["model.weight"])
    assert lines(run.path / "history.jsonl") == [row(1), row(2), row(3)]
    assert [line["step"] for line in lines(run.path / "steps.jsonl")] == list(range(1, 31))
    return present[0]


@DEATHS
def test_p3_a_save_that_dies_at_any_operation_leaves_complete_checkpoints(
    run, tmp_path, power, capsys
):
    newest = []

    def check(run, fault):
        newest.append(check_checkpoints(run, (10, 20, 30)))
        save(run, 30)  # the next life
        assert check_checkpoints(run, (20, 30)) == 30
        assert {p.name for p in run.checkpoints_dir.iterdir()} == {
            "step-00000020",
            "step-00000030",
            ".lock",
        }

    assert every_fault(run, tmp_path, lambda run: save(run, 30), check, power=power) > 15
    assert newest == sorted(newest)  # from one operation on, it is the new one
    assert set(newest) == {20, 30}
    assert "damaged" not in capsys.readouterr().err


def test_p3_lines_are_on_disk_before_a_checkpoint_and_its_name_before_others_are_removed(
    run, monkeypatch
):
    calls, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def rename(source, target):
        calls.append(f"-> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    save(run, 30)
    renamed = calls.index("-> step-00000030")
    assert {"history.jsonl", "steps.jsonl"} <= {*calls[:renamed]}
    assert calls[renamed + 1] == "checkpoints"
    assert calls[renamed + 2 :] == ["-> .step-00000010"]  # the oldest is removed


def test_a_resumed_run_keeps_no_results_of_its_earlier_end(run):
    names = (run_dir.REPORT, run_dir.PREDICTIONS, run_dir.PROBABILITIES, run_dir.IMAGES,
             run_dir.PAGE, run_dir.CARD, ".report.json.1.tmp")  # fmt: skip
    (run.path / run_dir.PLOTS).mkdir()
    for path in (*(run.path / name for name in names), run.path / run_dir.PLOTS / "x.png"):
        path.write_bytes(b"old")
    run.resume({}, 3, 20)
    assert {p.name for p in run.path.iterdir()} == {
        "checkpoints", "config.json", "history.jsonl", "steps.jsonl"
    }  # fmt: skip


def test_predictions_without_probabilities_remove_those_of_an_earlier_evaluation(run):
    run.write_predictions(b"new", b"probabilities")
    run.write_predictions(b"new", None)
    assert not (run.path / run_dir.PROBABILITIES).exists()


@DEATHS
def test_p3_a_checkpoint_replaces_a_damaged_one(run, tmp_path, power):
    damaged = run.checkpoints_dir / "step-00000030"
    shutil.copytree(run.checkpoints_dir / "step-00000020", damaged)
    os.truncate(damaged / "tensors.safetensors", 5)
    steps = set()

    def check(run, _):
        steps.add(latest(run).metadata["train_state"]["step"])
        save(run, 30)
        assert check_checkpoints(run, (20, 30)) == 30

    every_fault(run, tmp_path, lambda run: save(run, 30), check, power=power)
    assert steps == {20, 30}


@DEATHS
def test_p3_best_weights_are_the_old_or_the_new(run, tmp_path, power):
    def weights(value):
        return {"weight": torch.full((1000,), value)}

    def write(run, value=2.0):
        weights_module.write_weights(run.best, weights(value), {"seed": value})

    write(run, 1.0)
    before, values = run.best.read_bytes(), []
    write(run)
    after = run.best.read_bytes()
    write(run, 1.0)

    def check(run, _):
        assert run.best.read_bytes() in (before, after)
        values.append(run.best.read_bytes() == after)
        assert check_checkpoints(run, (10, 20)) == 20

    assert every_fault(run, tmp_path, write, check, power=power) > 5
    assert values == sorted(values)
    assert set(values) == {False, True}


@DEATHS
def test_p3_resuming_leaves_complete_lines(run, tmp_path, power):
    with open(run.path / "history.jsonl", "a") as file:
        file.write('{"epoch": 4, "val_')  # an incomplete line
    for name in (
        "report.json",
        ".best.safetensors.1.tmp",
    ):  # from the end of the run, and of a killed process
        (run.path / name).write_text("{}")

    def resume_run(run):
        run.resume({"recipe": "smoke"}, epoch=2, step=15)

    def check(run, _):
        history = (run.path / "history.jsonl").read_text()
        assert history.startswith(json.dumps(row(1)) + "\n")
        resume_run(run)
        assert lines(run.path / "history.jsonl") == [row(1)]
        assert [line["step"] for line in lines(run.path / "steps.jsonl")] == list(range(1, 16))
        assert json.loads((run.path / "config.json").read_text())["recipe"] == "smoke"
        assert {p.name for p in run.path.iterdir()} == {
            "config.json", "history.jsonl", "steps.jsonl", "checkpoints",
        }  # fmt: skip

    assert every_fault(run, tmp_path, resume_run, check, power=power) > 15


@DEATHS
def test_p3_a_resumption_that_dies_can_be_resumed(run, tmp_path, power):
    """Resuming removes damaged checkpoints and the temporary files of killed processes."""
    for name in ("step-00000030", ".step-00000040.77", ".step-00000005"):
        shutil.copytree(run.checkpoints_dir / "step-00000010", run.checkpoints_dir / name)
        (run.checkpoints_dir / name / "state.json").unlink()

    def check(run, _):
        assert latest(run).metadata["train_state"]["step"] == 20
        assert {p.name for p in run.checkpoints_dir.iterdir() if p.is_dir()} == {
            "step-00000010", "step-00000020",
        }  # fmt: skip

    assert every_fault(run, tmp_path, latest, check, power=power) > 5


# A full disk: that checkpoint is not written, a warning says so, and training continues.


@pytest.mark.parametrize("lasting", [False, True])
def test_p3_a_disk_that_is_full_at_any_write_loses_only_that_checkpoint(
    run, tmp_path, lasting, capsys
):
    def check(run, fault):
        error = capsys.readouterr().err
        written = (run.checkpoints_dir / "step-00000030").exists()
        if fault.struck:
            [line] = error.splitlines()
            assert line.startswith("warning: ")
            assert "No space left on device" in line
            # Two files and the directory are renamed; then the oldest, to be removed.
            is_removing = fault.log[: fault.n].count("os.rename") > 3
            problem = "10 is not removed: " if is_removing else "30 is not written: "
            assert f"step-000000{problem}" in line
        assert check_checkpoints(run, (10, 20, 30)) == (30 if written else 20)
        save(run, 40)  # once there is space again
        assert check_checkpoints(run, (10, 20, 30, 40)) == 40
        assert len(run.checkpoints) == 2
        assert capsys.readouterr().err == ""

    every_fault(run, tmp_path, lambda run: save(run, 30), check, full=True, lasting=lasting)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_p3_weights_that_are_not_finite_are_not_saved(run, capsys, bad):
    model = SimpleNamespace(named_parameters=lambda: [("weight", None)])
    writer = SimpleNamespace(run=run, train_step=SimpleNamespace(config=CONFIG, model=model))
    manager.CheckpointManager._write(
        writer, {"model.weight": torch.tensor([1.0, bad])}, metadata(30)
    )
    assert check_checkpoints(run, (10, 20)) == 20
    assert "step-00000030 is not written: " in capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 1, len(json.dumps(row(4)))])  # the last: all but its end
def test_p3_a_line_that_does_not_fit_leaves_no_incomplete_line(run, monkeypatch, room):
    class FullFile(io.FileIO):
        def write(self, content):
            return super().write(content[:room])

    before = tree(run.path)
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "open", lambda *args, **_: FullFile(*args), raising=False)
        with pytest.raises(UserError, match=r"cannot write .*history\.jsonl"):
            run.add_epoch(row(4))
    assert tree(run.path) == before
