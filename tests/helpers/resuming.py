"""What the tests of resuming share: small trainings, cut off, resumed and compared."""

import json

import pytest

import train
from lab.checkpoint import manager

SAME = (
    "best.safetensors", "report.json", "predictions.csv", "steps.jsonl", "images.safetensors",
)  # fmt: skip
CLOCK = ("train_seconds", "eval_seconds", "images_per_second")
SMALL = [
    "--dataset", "digits", "--recipe", "smoke", "--threads", "1", "--quiet", "--log-every", "1",
]  # fmt: skip
LENET = [
    *SMALL,
    "--epochs",
    "3",
    "--max-steps",
    "0",
    "--max-train-samples",
    "100",
]  # 4 steps an epoch
ALEXNET = [*LENET, "--model", "alexnet", "--dataset", "digits"]
ALEXNET += ["--max-train-samples", "30", "--batch-size", "8"]  # 4 steps an epoch, too


class Killed(BaseException):
    """Stands for the end of the process: nothing in train.py catches it."""


def start(folder, *words, name="run"):
    return train.main([*words, "--output-dir", str(folder), "--name", name])


def resume(path, *words):
    return train.main(["--resume", str(path), "--quiet", *words])


def cut_off(monkeypatch, step, call):
    """`call()`, which dies after `step` steps."""
    original = manager.CheckpointManager.after_step

    def after_step(kept, best, position):
        stops = original(kept, best, position)
        if train_state.step == step:
            raise Killed
        return stops

    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "after_step", after_step)
        with pytest.raises(Killed):
            call()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_lines(path)]


def same_end(a, b):
    """Nothing; AssertionError where two runs did not end alike."""
    for name in SAME:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert timeless(a / "history.jsonl") == timeless(b / "history.jsonl")
