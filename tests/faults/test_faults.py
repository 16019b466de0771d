"""P3: a run whose process, machine or disk fails between any two file operations of a save."""

import io
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dying import Fault
from mistakes import tree

from lab.checkpoint import manager, run_dir, train_state
from lab.checkpoint import weights as weights_module
from lab.config.recipes import resolve
from lab.errors import UserError

CONFIG = resolve({"dataset": "digits", "recipe": "smoke", "keep_checkpoints": 2})
ROOM = 100  # a save takes fewer operations
DEATHS = pytest.mark.parametrize("power", [False, True], ids=["killed", "power-cut"])


def metadata(step: int) -> dict:
    position = dict.fromkeys(train_state.TRAIN_STATE_TYPES, 0) | {"epoch": step // 10, "step": step}
    return {"format": train_state.CHECKPOINT_FORMAT, "train_state": position, "totals": [[0.0, 0.0, 0.0]], "best": {},
            "config": asdict(CONFIG), "fingerprints": {}, "precision": "no", "scaler": None,
            "world_size": 1}  # fmt: skip


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((1000,), float(step))}


def save(run: run_dir.RunDir, step: int) -> None:
    """What the training's writer does for the state of `step`."""
    model = SimpleNamespace(named_parameters=list)  # none whose values would be looked at
    train_step = SimpleNamespace(config=CONFIG, model=model)
    manager.CheckpointManager._write(
        SimpleNamespace(run=run, train_step=train_step), tensors(step), metadata(step)
    )


def row(epoch: int) -> dict:
    return {"epoch": epoch, "val_accuracy": epoch / 10, "val_loss": 1.0}


@pytest.fixture
def run(tmp_path):
    """A run that has the states of steps 10 and 20, best weights, and lines of epochs 1 to 3."""
    run = run_dir.RunDir(tmp_path / "run")
    run.checkpoints_dir.mkdir(parents=True)
    run.create({})
    run.add_epoch(*map(row, (1, 2, 3)))
    run.add_steps(*({"step": step} for step in range(1, 31)))
    save(run, 10)
    save(run, 20)
    return run


def found(run: run_dir.RunDir) -> train_state.Checkpoint:
    """What --resume finds."""
    with manager.open_run(replace(CONFIG, resume=str(run.path)), is_main_process=True) as (
        _,
        state,
    ):
        return state


def every_fault(run, tmp_path, work, check, **fault):
    """Does `work(run)` with the n-th operation failing, for each n, and then `check(run, fault)`.

    Returns how many operations it takes.
    """
    for n in range(1, ROOM):
        copy = run_dir.RunDir(tmp_path / f"{n}" / "run")
        shutil.copytree(run.path, copy.path)
        with Fault(copy.path, n, **fault) as struck:
            struck.attempt(lambda copy=copy: work(copy))
        check(copy, struck)
        if not struck.struck:
            return n - 1
    raise AssertionError("more operations than expected")


def lines(path: Path) -> list[dict]:
    content = path.read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]


def require_whole(run: run_dir.RunDir, steps: tuple[int, ...]) -> int:
    """The newest state's step; every state is whole, and they are of `steps`."""
    kept = [int(folder.name[5:]) for folder in run.checkpoints]
    assert set(kept) <= set(steps)
    state = found(run)
    assert state.metadata["train_state"]["step"] == kept[0]
    for step in kept:
        read, values = train_state.read_checkpoint(run.checkpoints_dir / f"step-{step:08}")
        assert read["train_state"]["step"] == step
        assert torch.equal(values["model.weight"], tensors(step)["model.weight"])
    assert lines(run.path / "history.jsonl") == [row(1), row(2), row(3)]
    assert [line["step"] for line in lines(run.path / "steps.jsonl")] == list(range(1, 31))
    return kept[0]


@DEATHS
def test_p3_a_save_that_dies_at_any_operation_leaves_whole_states(run, tmp_path, power, capsys):
    newest = []

    def check(run, fault):
        newest.append(require_whole(run, (10, 20, 30)))
        save(run, 30)  # the next life
        assert require_whole(run, (20, 30)) == 30
        assert {p.name for p in run.checkpoints_dir.iterdir()} == {
            "step-00000020",
            "step-00000030",
            ".lock",
        }

    assert every_fault(run, tmp_path, lambda run: save(run, 30), check, power=power) > 15
    assert newest == sorted(newest)  # from one operation on, it is the new one
    assert set(newest) == {20, 30}
    assert "damaged" not in capsys.readouterr().err


@DEATHS
def test_p3_a_state_that_takes_a_damaged_ones_place(run, tmp_path, power):
    damaged = run.checkpoints_dir / "step-00000030"
    shutil.copytree(run.checkpoints_dir / "step-00000020", damaged)
    os.truncate(damaged / "tensors.safetensors", 5)
    steps = set()

    def check(run, _):
        steps.add(found(run).metadata["train_state"]["step"])
        save(run, 30)
        assert require_whole(run, (20, 30)) == 30

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
        assert require_whole(run, (10, 20)) == 20

    assert every_fault(run, tmp_path, write, check, power=power) > 5
    assert values == sorted(values)
    assert set(values) == {False, True}


@DEATHS
def test_p3_going_on_cuts_lines_whole(run, tmp_path, power):
    with open(run.path / "history.jsonl", "a") as file:
        file.write('{"epoch": 4, "val_')  # a line that a death cut short
    for name in ("report.json", ".best.safetensors.1.tmp"):  # of its former end, and of a death
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
            "config.json", "history.jsonl", "steps.jsonl", "state",
        }  # fmt: skip

    assert every_fault(run, tmp_path, resume_run, check, power=power) > 15


@DEATHS
def test_p3_a_resumption_that_dies_can_be_resumed(run, tmp_path, power):
    """What `find` removes: damaged states, and what writers that were killed have left."""
    for name in ("step-00000030", ".step-00000040.77", ".step-00000005"):
        shutil.copytree(run.checkpoints_dir / "step-00000010", run.checkpoints_dir / name)
        (run.checkpoints_dir / name / "state.json").unlink()

    def check(run, _):
        assert require_whole_after_damage(run) == 20

    def require_whole_after_damage(run):
        state = found(run)
        assert {p.name for p in run.checkpoints_dir.iterdir() if p.is_dir()} == {
            "step-00000010", "step-00000020",
        }  # fmt: skip
        return state.metadata["train_state"]["step"]

    assert every_fault(run, tmp_path, found, check, power=power) > 5


# A full disk: the state that did not fit is lost, which is said, and the training goes on.


@pytest.mark.parametrize("lasting", [False, True])
def test_p3_a_disk_that_is_full_at_any_write_loses_that_state_alone(run, tmp_path, lasting, capsys):
    def check(run, fault):
        error = capsys.readouterr().err
        written = (run.checkpoints_dir / "step-00000030").exists()
        if fault.struck:
            [line] = error.splitlines()
            assert line.startswith("warning: ")
            assert "No space left on device" in line
            # Two files' renames and the folder's: then the oldest is renamed, to be removed.
            removing = fault.log[: fault.n].count("os.rename") > 3
            said = "10 is not removed: " if removing else "30 is not written: "
            assert f"step-000000{said}" in line
        assert require_whole(run, (10, 20, 30)) == (30 if written else 20)
        save(run, 40)  # once there is space again
        assert require_whole(run, (10, 20, 30, 40)) == 40
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
    assert require_whole(run, (10, 20)) == 20
    assert "step-00000030 is not written: " in capsys.readouterr().err


@pytest.mark.parametrize("room", [0, 1, len(json.dumps(row(4)))])  # the last: all but its end
def test_p3_a_line_that_does_not_fit_leaves_no_part(run, monkeypatch, room):
    class Filling(io.FileIO):
        def write(self, content):
            return super().write(content[:room])

    before = tree(run.path)
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "open", lambda *words, **_: Filling(*words), raising=False)
        with pytest.raises(UserError, match=r"cannot write .*history\.jsonl"):
            run.add_epoch(row(4))
    assert tree(run.path) == before
