"""P3: signals and the time limit stop a run between two steps, with a checkpoint to resume from."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from resuming import LENET, read_lines, resume, same_end, start
from worlds import python, torchrun
from worlds import run as launch_and_wait
from worlds import start as launch

import train
from lab.checkpoint import interrupt
from lab.checkpoint.interrupt import InterruptHandler, StopReason
from lab.engine.training import TrainStep
from lab.errors import UserError

ONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
TWO = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
STREAMING = ["--model", "lenet5", "--recipe", "smoke", "--loader", "streaming", "--threads", "1"]
STREAMING += ["--workers", "2", "--max-train-samples", "0", "--max-steps", "0"]
STREAMING += ["--batch-size", "4", "--log-every", "1"]
LONG = [*LENET, "--epochs", "4000", "--checkpoint-every", "1000000", "--schedule", "constant"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A directory of 40 training, 8 validation and 8 test images."""
    root = tmp_path_factory.mktemp("images")
    for split, num_images in (("train", 40), ("val", 8), ("test", 8)):
        for i in range(num_images):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    return root


def test_exit_codes_and_descriptions_of_stop_reasons():
    assert [(reason.exit_code, reason.description) for reason in StopReason] == [
        (0, "--max-hours has passed"), (143, "SIGUSR1"), (143, "SIGTERM"), (130, "Ctrl-C"),
    ]  # fmt: skip


def test_a_time_limit_counts_from_the_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    interrupts = InterruptHandler(ONE, 100.0, 0.5, 0)
    now[0] += 1799
    assert interrupts.stop_reason(1) is None
    now[0] += 2
    assert interrupts.stop_reason(2) is StopReason.TIME_LIMIT


@pytest.mark.parametrize("reason", [StopReason.SIGTERM, StopReason.TIME_LIMIT])
def test_p3_a_signal_to_one_process_stops_all_at_the_same_step(monkeypatch, reason):
    def all_reduce(votes, op):
        assert op == interrupt.distributed.ReduceOp.MAX
        votes.copy_(votes.maximum(torch.tensor([reason, 1])))  # the other process's votes

    monkeypatch.setattr(interrupt.distributed, "all_reduce", all_reduce)
    assert InterruptHandler(TWO, 0, 0, 0).stop_reason(1) is reason


def test_p3_a_signal_in_a_step_saves_before_the_run_ends(tmp_path, monkeypatch):
    steps, original = itertools.count(1), TrainStep.run

    def interrupted(*arguments):
        if next(steps) == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments)

    def handler(*_):
        pytest.fail("training did not catch the signal")

    monkeypatch.setattr(TrainStep, "run", interrupted)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        exit_code = start(tmp_path, *LENET).exit_code
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert exit_code == 143
    assert max(p.name for p in (tmp_path / "run/checkpoints").glob("step-*")) == "step-00000006"
    assert not (tmp_path / "run/report.json").exists()


TWICE = """
import os, signal, time, torch, types
from lab.checkpoint import interrupt
one = types.SimpleNamespace(num_processes=1, device=torch.device("cpu"))
for repeat_seconds in (60, 0):
    interrupt.REPEAT_SECONDS = repeat_seconds
    with interrupt.InterruptHandler(one, 0, 0, 0) as interrupts:
        for _ in range(2):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        print(interrupts.stop_reason(1).name, flush=True)
"""


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """A signal that is sent both to the process and to its process group counts once."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    ended = launch_and_wait(python(script), limit=200)
    assert (ended.code, ended.stdout) == (130, "SIGINT\n")


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_p3_a_signal_to_the_workers_too_saves_a_checkpoint(images, tmp_path, name):
    """A terminal sends Ctrl-C, and torchrun, Slurm and Docker send SIGTERM, to every process.

    All processes stop after the same step, and the run can be resumed.
    """
    words = ["train.py", *STREAMING, "--dataset", images, "--output-dir", tmp_path]
    words += ["--name", "run", "--epochs", 4000, "--checkpoint-every", 1000000]
    path = tmp_path / "run"
    with launch(python(*words) if name == "SIGINT" else torchrun(2, *words)) as world:
        world.until(lambda: _num_steps(path) > 20, limit=200)
        if name == "SIGINT":
            os.killpg(world.process.pid, signal.SIGINT)
        else:  # torchrun signals the process group of each of its processes
            world.process.send_signal(signal.SIGTERM)
        ended = world.wait(200)
    assert ended.code == (130 if name == "SIGINT" else 1), ended.stderr
    assert ended.errors == []
    assert ended.left_behind == []
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("warning: stopped")]
    assert line.endswith(f"resume with: python train.py --resume {path}")
    step = int(line.split(" after step ")[1].split(";")[0])
    newest = max((path / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{step:08}"
    metadata = json.loads((newest / "state.json").read_text())["metadata"]
    assert metadata["train_state"]["step"] == step
    assert not (path / "report.json").exists()
    epochs = step // 10 + 1
    resume(path, "--epochs", str(epochs))
    steps = [row["step"] for row in read_lines(path / "steps.jsonl")]
    assert steps == list(range(1, 10 * epochs + 1))


def _num_steps(path):
    lines = path / "steps.jsonl"
    return len(lines.read_bytes().splitlines()) if lines.exists() else 0


def test_p7_a_run_that_fails_ends_the_workers_of_all_its_loaders(images, tmp_path, monkeypatch):
    """A notebook keeps the traceback, and with it the loaders, so it would never exit."""
    steps, original = itertools.count(1), TrainStep.run

    def failing(*arguments):
        if next(steps) == 12:  # in the second epoch, after an evaluation: both loaders have workers
            raise UserError("the step failed", "Try again")
        return original(*arguments)

    monkeypatch.setattr(TrainStep, "run", failing)
    words = [*STREAMING, "--dataset", str(images), "--output-dir", str(tmp_path), "--epochs", "2"]
    with pytest.raises(UserError, match="the step failed") as caught:
        train.main(words)
    assert multiprocessing.active_children() == []
    assert caught.traceback


def test_p7_a_damaged_validation_image_ends_the_workers_of_all_loaders(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/val/a/0.png").write_bytes(b"not an image")
    words = [*STREAMING, "--dataset", str(tmp_path / "images"), "--output-dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"cannot read .*0\.png") as caught:
        train.main(words)
    assert multiprocessing.active_children() == []
    assert caught.value.rank_local


def test_processes_communicate_about_once_a_second(monkeypatch):
    """Also in the first seconds of a run that is resumed from a late step."""
    now, calls = [0.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupt.distributed, "all_reduce", lambda votes, op: calls.append(now[0]))
    interrupts = InterruptHandler(TWO, 0, 0, 5000)
    for step in range(5001, 5201):
        now[0] += 0.1
        assert interrupts.stop_reason(step) is None
    gaps = [b - a for a, b in itertools.pairwise(calls)]
    assert len(calls) > 15
    assert max(gaps) < 1.3


def test_max_hours_stops_with_a_checkpoint(tmp_path, capsys):
    assert start(tmp_path, *LONG, "--max-hours", str(0.5 / 3600)).exit_code == 0
    assert "stopped (--max-hours has passed) after step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.json").exists()
    epochs = str(_num_steps(tmp_path / "run") // 4 + 1)
    start(tmp_path, *LONG, "--epochs", epochs, name="whole")
    resume(tmp_path / "run", "--epochs", epochs, "--max-hours", "0")
    same_end(tmp_path / "run", tmp_path / "whole")


def test_patience_counts_epochs_without_a_better_one(tmp_path, capsys):
    words = [*LENET, "--epochs", "30", "--lr", "1e-12", "--patience", "2"]
    words.remove("--quiet")
    start(tmp_path, *words)
    assert [row["epoch"] for row in read_lines(tmp_path / "run" / "history.jsonl")] == [1, 2, 3]
    assert "stopped: no better epoch in the last 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["best_epoch"] == 1


def test_signals_are_left_alone_off_the_main_thread(tmp_path):
    """A notebook's server may train in a thread."""
    thread = threading.Thread(target=start, args=(tmp_path, *LENET))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "report.json").exists()


def test_p3_new_settings_that_no_checkpoint_has_are_not_forgotten(tmp_path, monkeypatch, capsys):
    """A finished run is to train further, and stops while its last epoch is evaluated again."""
    run = start(tmp_path, *LENET)

    def stop_reason(_, step, check_now=False):
        return StopReason.SIGTERM if check_now else None

    with monkeypatch.context() as patch:
        patch.setattr(InterruptHandler, "stop_reason", stop_reason)
        assert resume(run.path, "--epochs", "4").exit_code == 143
    assert capsys.readouterr().err.endswith("after step 12; resume with: the same command\n")
    assert resume(run.path, "--epochs", "4").is_finished
    assert len(read_lines(run.path / "history.jsonl")) == 4
