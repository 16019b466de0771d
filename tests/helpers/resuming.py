"""Small runs that are killed, resumed and compared, for the tests of resuming."""

import json

import pytest

import train
from lab.checkpoint import manager

SAME = (
    "best.safetensors", "report.json", "predictions.csv", "predictions.safetensors",
    "steps.jsonl", "images.safetensors",
)  # fmt: skip
CLOCK = ("train_seconds", "eval_seconds", "images_per_second")
SMALL = [
    "--dataset", "digits", "--recipe", "smoke", "--threads", "1", "--quiet", "--log-every", "1",
]  # fmt: skip
# Both have 4 steps per epoch.
LENET = [*SMALL, "--epochs", "3", "--max-steps", "0", "--max-train-samples", "100"]
ALEXNET = [*LENET, "--model", "alexnet", "--max-train-samples", "30", "--batch-size", "8"]


class Killed(BaseException):
    """Stands for the death of the process: nothing in train.py catches it."""


def start(folder, *words, name="run"):
    return train.main([*words, "--output-dir", str(folder), "--name", name])


def resume(path, *words):
    return train.main(["--resume", str(path), "--quiet", *words])


def cut_off(monkeypatch, step, call):
    """Call `call`, which dies after `step` steps."""
    original = manager.CheckpointManager.after_step

    def after_step(checkpoints, best, state):
        should_stop = original(checkpoints, best, state)
        if state.step == step:
            raise Killed
        return should_stop

    with monkeypatch.context() as patch:
        patch.setattr(manager.CheckpointManager, "after_step", after_step)
        with pytest.raises(Killed):
            call()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_lines(path)]


def same_end(a, b):
    """Assert that the files of two runs are equal."""
    for name in SAME:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert timeless(a / "history.jsonl") == timeless(b / "history.jsonl")
