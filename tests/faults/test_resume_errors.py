"""P7: mistakes with --resume; locks and full disks."""

import shutil
import subprocess
import sys

import pytest
from mistakes import tree
from resuming import LENET, SMALL, resume, same_end, start

import train
from lab import errors
from lab.checkpoint import atomic_io, manager, run_dir, train_state
from lab.data import splits
from lab.data.fingerprint import FORMAT
from lab.errors import UserError


def test_p7_other_settings_are_refused(fails, copied):
    before = (copied / "steps.jsonl").read_bytes()
    for words, problem in {
        "--lr 0.5": "--lr 0.5 differs from the run's, which is 0.002",
        "--batch-size 16": "--batch-size 16 differs from the run's, which is 32",
        "--model alexnet": "--model alexnet differs from the run's, which is lenet5",
        "--seed 1": "--seed 1 differs from the run's, which is 42",
    }.items():
        message = fails(train, "--resume", copied, *words.split())
        assert message == f"{problem}. Leave it out, or start a new run."
    message = fails(train, "--resume", copied, "--epochs", 2)
    assert (
        message == "invalid --epochs 2: the run is in epoch 3. Give more epochs, or leave it out."
    )
    assert (copied / "steps.jsonl").read_bytes() == before


def test_the_same_settings_may_be_given_again(copied, finished):
    resume(copied, "--lr", "0.002", "--recipe", "smoke", "--dataset", "digits", "--workers", "1")
    same_end(copied, finished)


def test_automatic_settings_may_be_given_again(copied):
    stored = train_state.Checkpoint(
        run_dir.RunDir(copied),
        copied,
        manager.latest_checkpoint(run_dir.RunDir(copied)).metadata,
        {},
    )
    automatic = {"epochs": 0, "image_size": 0, "crop_pct": 0.0, "interpolation": "auto"}
    config = stored.config({})
    assert stored.config(automatic) == config
    assert config.quiet is False  # the run was started with --quiet
    assert stored.config({"quiet": True}).quiet


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--resume gone", "there is no run gone. Give --resume the directory of a run."),
        (
            f"--resume {'n' * 300}",
            f"there is no run {'n' * 300}. Give --resume the directory of a run.",
        ),
        ("--resume old --name x", "--resume and --name both name a run. Leave out --name."),
        ("--resume auto", "--resume auto needs the --name of a run. Add --name."),
        (
            "--resume auto --name x --overwrite",
            "--overwrite would delete the run that --resume continues. Give only one of them.",
        ),
        (
            "--resume old",
            "old contains no checkpoint to resume from. Start a new run with another --name.",
        ),
        (
            "--resume runs",
            "runs contains no checkpoint to resume from. "
            "Give --resume one of its runs: runs/a, runs/b, runs/c.",
        ),
        (
            "--resume auto --name old --output-dir .",
            "old contains no checkpoint to resume from. Start a new run with another --name.",
        ),
    ],
)
def test_p7_there_is_nothing_to_resume(fails, tmp_path, words, message):
    for name in "dcba":
        (tmp_path / "runs" / name / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "runs" / "another").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "best.safetensors").write_bytes(b"weights without a checkpoint")
    assert fails(train, *SMALL, *words.split()) == message


def test_p7_a_run_is_resumed_where_it_is(fails, copied):
    assert fails(train, "--resume", copied, "--output-dir", "other") == (
        f"--output-dir other is not the directory of {copied}, the run to resume. "
        "Leave it out, or move the run first."
    )


def test_p7_a_checkpoint_does_not_download_into_a_directory_that_it_names(
    fails, tmp_path, copied, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("a download was started")

    monkeypatch.setattr("torchvision.datasets.MNIST.__init__", refuse)
    path = run_dir.RunDir(copied).checkpoints[0]
    metadata, tensors = train_state.read_checkpoint(path)
    metadata["config"] |= {"dataset": "mnist", "data_dir": str(tmp_path / "victim")}
    train_state.write_checkpoint(path, tensors, metadata)
    message = fails(train, "--resume", copied, "--epochs", 4)
    assert message.startswith(f"MNIST is not in {tmp_path}/victim")
    with pytest.raises(AssertionError, match="a download was started"):
        train.main(["--resume", str(copied), "--epochs", "4", "--data-dir", str(tmp_path / "own")])


def test_p7_other_data_are_refused(fails, copied):
    folder = run_dir.RunDir(copied).checkpoints[0]
    metadata, tensors = train_state.read_checkpoint(folder)
    shutil.rmtree(folder)
    other = {**metadata["fingerprints"], "train": f"{FORMAT}-0", "test": f"{FORMAT}-0"}
    train_state.write_checkpoint(folder, tensors, metadata | {"fingerprints": other})
    assert fails(train, "--resume", copied, "--epochs", 4) == (
        "the data differ from those that the run was trained on (files of these splits were added, "
        "removed, renamed or replaced: train, test). "
        "Give the --dataset or --data-dir with the same files, or start a new run."
    )


HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_p7_two_trainings_do_not_write_into_one_folder(fails, monkeypatch, copied):
    monkeypatch.setattr(run_dir, "LOCK_TIMEOUT_SECONDS", 0.1)
    command = [sys.executable, "-c", HOLD, str(copied / "checkpoints" / ".lock")]
    write_error = f"another process is training in {copied}. "
    write_error += "Wait until it ends, or give another --name; if there is none, delete "
    write_error += f"{copied}/checkpoints/.lock."
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert fails(train, "--resume", copied) == write_error
        words = ("--name", copied.name, "--output-dir", copied.parent)
        assert fails(train, *SMALL, *words, "--overwrite") == write_error
        assert fails(train, *SMALL, *words, "--resume", "auto", "--epochs", 3) == write_error
        other.kill()
    resume(copied)  # the lock's file stays, and nobody holds it


def test_p7_a_full_disk_is_seen_before_training(fails, monkeypatch):
    monkeypatch.setattr(
        atomic_io.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 500_000)
    )
    message = fails(train, *SMALL, "--name", "x")
    assert message.startswith(
        "a checkpoint takes 987.3 kB, but runs has 500.0 kB free. Free some space"
    )


def test_a_full_disk_later_loses_only_that_checkpoint(tmp_path, monkeypatch, finished, capsys):
    check_free_space = atomic_io.check_free_space
    calls = []

    def full_once(path, size):
        calls.append(size)
        if len(calls) == 3:
            raise UserError("full", "Free some")
        check_free_space(path, size)

    monkeypatch.setattr(manager, "check_free_space", full_once)
    words = ["--checkpoint-every", "3", "--keep-checkpoints", "9"]
    start(tmp_path, *LENET, *words)
    checkpoints = run_dir.RunDir(tmp_path / "run").checkpoints
    assert [int(p.name.removeprefix("step-")) for p in checkpoints] == [12, 9, 8, 6, 3]
    assert calls[1] == pytest.approx(calls[0], rel=0.35)  # estimated before the first checkpoint
    assert "step-00000004 is not written: full. Free some." in capsys.readouterr().err
    same_end(tmp_path / "run", finished)


def test_p7_the_last_checkpoint_is_named_with_the_error(monkeypatch, copied):
    def fail(*_):
        raise UserError("the image x is damaged", "Delete it")

    monkeypatch.setattr("lab.engine.training.TrainStep.run", fail)
    with pytest.raises(UserError) as caught:
        resume(copied, "--epochs", "9")
    assert str(caught.value) == (
        "the image x is damaged. Delete it. The last complete checkpoint of the run is "
        f"{copied}/checkpoints/step-00000012."
    )


def test_a_notebook_may_resume_in_the_same_process(copied):
    """A run that failed there is unlocked."""
    with pytest.raises(UserError, match="differs from the run's"):
        resume(copied, "--lr", "0.7")
    assert errors.run_script(lambda: resume(copied).exit_code) == 0


def test_p3_a_second_start_neither_deletes_nor_joins_a_run(tmp_path, monkeypatch, finished):
    """While the first reads its data, the second one starts."""
    load_splits, write_error = splits.load_splits, []
    command = [*LENET, "--resume", "auto"]

    def load_slowly(*arguments):
        monkeypatch.setattr(splits, "load_splits", load_splits)
        for words in (command, LENET, [*LENET, "--overwrite"]):
            before = tree(tmp_path)
            with pytest.raises(UserError) as caught:
                start(tmp_path, *words)
            write_error.append(caught.value.what)
            assert tree(tmp_path) == before
        return load_splits(*arguments)

    monkeypatch.setattr(run_dir, "LOCK_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(splits, "load_splits", load_slowly)
    start(tmp_path, *command)
    assert write_error == [f"another process is training in {tmp_path}/run"] * 3
    same_end(tmp_path / "run", finished)
