"""Signals, time limit, patience: a run stops between two steps, with a state to go on from."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from resuming import LENET, read_lines, resume, same_end, start
from worlds import python, run, torchrun
from worlds import start as launch

import train
from lab.checkpoint import interrupt
from lab.checkpoint.interrupt import SIGNALS, StopReason.TIME_LIMIT, InterruptHandler
from lab.engine import training
from lab.errors import UserError

ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
STREAMING = ["--dataset", "folder", "--recipe", "smoke", "--loader", "streaming", "--threads", "1"]
STREAMING += [
    "--workers",
    "2",
    "--max-train-samples",
    "0",
    "--max-steps",
    "0",
    "--batch-size",
    "4",
    "--log-every",
    "1",
]
LONG = [*LENET, "--epochs", "4000", "--checkpoint-every", "1000000", "--schedule", "constant"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 images to train on, 8 to validate and 8 to test."""
    root = tmp_path_factory.mktemp("pictures")
    for split, num_images in (("train", 40), ("val", 8), ("test", 8)):
        for i in range(num_images):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    return root


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_noted_while_it_trains_alone(name):
    before = signal.getsignal(SIGNALS[name])
    with InterruptHandler(ALONE, 0, 0, 0) as interrupts:
        assert interrupts.stop_reason(1) == 0
        os.kill(os.getpid(), SIGNALS[name])
        assert interrupts.stop_reason(2) == interrupts.stop_reason(3) == SIGNALS[name]
    assert signal.getsignal(SIGNALS[name]) is before


def test_the_codes_and_words_of_a_stop():
    reasons = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, StopReason.TIME_LIMIT]
    assert [InterruptHandler.exit_code(reason) for reason in reasons] == [130, 143, 143, 0]
    assert [InterruptHandler.describe(reason) for reason in reasons] == [
        "Ctrl-C", "SIGTERM", "SIGUSR1", "--max-hours is over",
    ]  # fmt: skip


def test_a_time_limit_counts_from_the_start(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    interrupts = InterruptHandler(ALONE, 100.0, 0.5, 0)
    now[0] += 1799
    assert interrupts.stop_reason(1) == 0
    now[0] += 2
    assert interrupts.stop_reason(2) == StopReason.TIME_LIMIT


@pytest.mark.parametrize(("sent", "found"), [(signal.SIGTERM, signal.SIGTERM), (StopReason.TIME_LIMIT, -1)])
def test_p3_a_signal_to_one_process_stops_all_at_the_same_step(monkeypatch, sent, found):
    def all_reduce(asked, op):
        assert op == interrupt.distributed.ReduceOp.MAX
        asked.copy_(asked.maximum(torch.tensor([sent, -sent, 1])))  # what another process requests

    monkeypatch.setattr(interrupt.distributed, "all_reduce", all_reduce)
    interrupts = InterruptHandler(
        SimpleNamespace(num_processes=2, device=torch.device("cpu")), 0, 0, 0
    )
    assert interrupts.stop_reason(1) == found


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_p3_a_signal_in_a_step_saves_before_the_run_ends(tmp_path, monkeypatch, name):
    number, steps, original = SIGNALS[name], itertools.count(1), training.eager_step

    def signalled(*arguments):
        if next(steps) == 6:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(training, "train_step", signalled)
    before = signal.signal(number, lambda *_: pytest.fail("training did not catch the signal"))
    try:
        code = start(tmp_path, *LENET)
    finally:
        signal.signal(number, before)
    assert code == {"SIGTERM": 143, "SIGINT": 130}[name]
    assert max(p.name for p in (tmp_path / "run/checkpoints").glob("step-*")) == "step-00000006"
    assert not (tmp_path / "run/report.json").exists()


TWICE = """
import os, signal, sys, time, torch, types
import train
from lab.checkpoint import interrupt
from lab.errors import UserError
interrupt.REPEAT_SECONDS = float(sys.argv[1])
alone = types.SimpleNamespace(num_processes=1, device=torch.device("cpu"))
with interrupt.InterruptHandler(alone, 0, 0, 0) as interrupts:
    for _ in range(2):
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
    print(interrupts.stop_reason(1))
"""


@pytest.mark.parametrize(("pause", "code", "printed"), [(0, 130, ""), (60, 0, "2\n")])
def test_a_second_ctrl_c_ends_at_once(pause, code, printed):
    """But for one that comes with the first: to the process, and to its whole group."""
    ended = run(python("-c", TWICE, pause), limit=60)
    assert (ended.code, ended.stdout) == (code, printed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_p3_a_signal_saves_and_the_run_goes_on(tmp_path, name, code):
    """Wherever in a step or an evaluation it comes."""
    command = python("train.py", *LONG, "--output-dir", tmp_path, "--name", "run")
    with launch(command) as world:
        _train_a_while(world, tmp_path / "run")
        world.process.send_signal(SIGNALS[name])
        ended = world.wait(60)
    assert ended.code == code, ended.stderr
    step = _stopped_at(ended, tmp_path / "run")
    _goes_on_alike(tmp_path, step)


def _train_a_while(world, path, steps=20):
    lines = path / "steps.jsonl"
    world.until(lambda: lines.exists() and len(lines.read_bytes().splitlines()) > steps, limit=90)


def _stopped_at(ended, path):
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("warning: stopped")]
    assert line.endswith(f"go on with: python train.py --resume {path}")
    step = int(line.split(" after step ")[1].split(";")[0])
    newest = max((path / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{step:08}"
    assert json.loads((newest / "state.json").read_text())["metadata"]["train_state"]["step"] == step
    assert ended.left_behind == []
    assert not (path / "report.json").exists()
    return step


def _goes_on_alike(folder, step):
    """What is resumed to the end of the next epoch is what was never stopped."""
    epochs = step // 4 + 1
    start(folder, *LONG, "--epochs", str(epochs), name="whole")
    resume(folder / "run", "--epochs", str(epochs), "--max-hours", "0")
    same_end(folder / "run", folder / "whole")


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_p3_sigterm_to_the_workers_too_saves_and_ends_with_143(pictures, tmp_path, num_processes):
    """torchrun, Slurm and docker send it to every process; all stop after the same step."""
    words = ["train.py", *STREAMING, "--data-dir", pictures, "--output-dir", tmp_path]
    words += ["--name", "run", "--epochs", 4000, "--checkpoint-every", 1000000]
    with launch(python(*words) if num_processes == 1 else torchrun(2, *words)) as world:
        _train_a_while(world, tmp_path / "run")
        if num_processes == 1:
            os.killpg(world.process.pid, signal.SIGTERM)
        else:  # it signals the process group of each of its processes
            world.process.send_signal(signal.SIGTERM)
        ended = world.wait(60)
    assert ended.code == (143 if num_processes == 1 else 1), ended.stderr
    assert ended.errors == []
    step = _stopped_at(ended, tmp_path / "run")
    epochs = step // 10 + 1
    resume(tmp_path / "run", "--epochs", str(epochs))
    steps = [row["step"] for row in read_lines(tmp_path / "run" / "steps.jsonl")]
    assert steps == list(range(1, 10 * epochs + 1))


def test_p7_a_run_that_fails_ends_the_workers_of_all_its_loaders(pictures, tmp_path):
    """Those of the training loader, too, when an image of the validation split is damaged.

    A notebook keeps the traceback, and with it the loaders, and would never come to its end.
    """
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures/val/a/0.png").write_bytes(b"no picture")
    words = [*STREAMING, "--data-dir", str(tmp_path / "pictures"), "--output-dir", str(tmp_path)]
    with pytest.raises(UserError, match="cannot read the picture") as caught:
        train.main(words)
    assert multiprocessing.active_children() == []
    assert caught.value.rank_local


def test_processes_ask_each_other_about_once_a_second(monkeypatch):
    """Also in the first seconds of a run that goes on from a late step."""
    now, asked = [0.0], []
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupt.distributed, "all_reduce", lambda flags, op: asked.append(now[0]))
    interrupts = InterruptHandler(
        SimpleNamespace(num_processes=2, device=torch.device("cpu")), 0, 0, 5000
    )
    for step in range(5001, 5201):
        now[0] += 0.1
        assert interrupts.stop_reason(step) == 0
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert len(asked) > 15
    assert max(gaps) < 1.3


def test_max_hours_stops_with_a_state(tmp_path, capsys):
    begin = time.monotonic()
    assert start(tmp_path, *LONG, "--max-hours", str(0.5 / 3600)) == 0
    assert time.monotonic() - begin < 60
    assert "stopped (--max-hours is over) after step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.json").exists()
    step = len(read_lines(tmp_path / "run" / "steps.jsonl"))
    _goes_on_alike(tmp_path, step)


def test_patience_counts_epochs_without_a_better_one(tmp_path, capsys):
    words = [*LENET, "--epochs", "30", "--lr", "1e-12", "--patience", "2"]
    words.remove("--quiet")
    start(tmp_path, *words)
    assert [row["epoch"] for row in read_lines(tmp_path / "run" / "history.jsonl")] == [1, 2, 3]
    assert "stopped: no better epoch in the last 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["best_epoch"] == 1


def test_signals_are_left_alone_off_the_main_thread(tmp_path):
    """As where a notebook's server trains in a thread."""
    thread = threading.Thread(target=start, args=(tmp_path, *LENET))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "report.json").exists()
