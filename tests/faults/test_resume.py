"""P3: a killed run is resumed as if nothing had happened, on any number of processes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from mistakes import tree
from resuming import ALEXNET, LENET, SMALL, Killed, cut_off, read_lines, resume, same_end, start
from safetensors import safe_open
from torch import nn
from worlds import run_world

import train
from lab.checkpoint import manager, run_dir, weights
from lab.checkpoint.train_state import TRAIN_STATE_TYPES, Checkpoint
from lab.distributed import has_native_bf16
from lab.engine import evaluation
from lab.errors import UserError

# Options, and the step after which the run is killed.
VARIANTS = {
    "nesterov": ([*LENET, "--optimizer", "nesterov", "--lr", "0.05", "--max-grad-norm", "1"], 2),
    "ema, accumulation": ([*LENET, "--ema-decay", "0.9", "--grad-accum-steps", "2"], 4),
    "mixup": ([*LENET, "--augment", "crop,cutout,mixup,cutmix"], 9),
    # Emulated bfloat16 takes minutes.
    "dropout, bfloat16": (
        [*ALEXNET, "--epochs", "1", *["--mixed-precision", "bf16"] * has_native_bf16("cpu")],
        3,
    ),
    "muon": ([*LENET, "--optimizer", "muon"], 5),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_p3_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, variant):
    words, step = VARIANTS[variant]
    start(tmp_path, *words, name="whole")
    cut_off(monkeypatch, step, lambda: start(tmp_path, *words, "--checkpoint-every", "2"))
    torch.manual_seed(step)  # another random state, as in a new process
    resume(tmp_path / "run")
    same_end(tmp_path / "run", tmp_path / "whole")


def test_p3_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path, monkeypatch, finished):
    command = [*LENET, "--checkpoint-every", "1", "--resume", "auto"]
    for step in (1, 3, 4, 8, 11):
        cut_off(monkeypatch, step, lambda: start(tmp_path, *command))
    start(tmp_path, *command)
    same_end(tmp_path / "run", finished)


def test_p3_a_run_killed_between_the_files_of_an_epoch(tmp_path, monkeypatch, finished):
    """After the best weights are written, before the line of history.jsonl."""

    def die(run, *rows):
        if rows and rows[0]["epoch"] == 2:
            raise Killed
        run_dir.RunDir._append(run, run_dir.HISTORY, rows)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir.RunDir, "add_epoch", die)
        with pytest.raises(Killed):
            start(tmp_path, *LENET)
    resume(tmp_path / "run")
    same_end(tmp_path / "run", finished)


@pytest.mark.parametrize("max_steps", [2, 6])  # in the first epoch, in the second
def test_p6_the_weights_of_an_incomplete_epoch_are_replaced(tmp_path, monkeypatch, max_steps):
    """Its accuracy is the best, but the epoch is completed and evaluated again."""

    def train_with(accuracies, call):
        class Altered(evaluation.Predictions):
            def scores(self):
                return super().scores() | {"accuracy": next(numbers, 0.0)}

        def altered(*arguments, **settings):
            return Altered(**vars(predict_all(*arguments, **settings)))

        numbers, predict_all = iter(accuracies), evaluation.predict_all
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "predict_all", altered)
            call()

    whole, part = [0.5, 0.4, 0.3], [0.9] if max_steps == 2 else [0.5, 0.9]
    train_with(whole, lambda: start(tmp_path, *LENET, name="whole"))
    train_with(part, lambda: start(tmp_path, *LENET, "--max-steps", str(max_steps)))
    metadata = weights.read_metadata(tmp_path / "run" / "best.safetensors")
    assert metadata["metrics"]["val_accuracy"] == part[0]  # complete epochs are preferred
    again = whole[len(part) - 1 :]
    train_with(again, lambda: resume(tmp_path / "run", "--max-steps", "0"))
    same_end(tmp_path / "run", tmp_path / "whole")
    metadata = weights.read_metadata(tmp_path / "run" / "best.safetensors")
    row = read_lines(tmp_path / "run" / "history.jsonl")[metadata["best_epoch"] - 1]
    assert metadata["metrics"] == {name: row[name] for name in metadata["metrics"]}


def test_checkpoints_are_named_by_their_step(finished):
    assert [p.name for p in run_dir.RunDir(finished).checkpoints] == [
        "step-00000012", "step-00000009",
    ]  # fmt: skip
    assert sorted(p.name for p in finished.glob("checkpoints/*/*")) == [
        "state.json", "state.json", "tensors.safetensors", "tensors.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--keep-checkpoints 99", [12, 9, 8, 6, 4, 3]),
        ("--keep-checkpoints 3", [12, 9, 8]),
    ],
)
def test_the_number_of_checkpoints(tmp_path, words, steps):
    start(tmp_path, *LENET, "--checkpoint-every", "3", *words.split())
    checkpoints = run_dir.RunDir(tmp_path / "run").checkpoints
    assert [int(p.name.removeprefix("step-")) for p in checkpoints] == steps


def test_p4_a_checkpoint_is_safetensors_and_json(finished):
    folder = finished / "checkpoints" / "step-00000009"
    with safe_open(folder / "tensors.safetensors", framework="pt") as file:
        keys = set(file.keys())
    with safe_open(finished / "best.safetensors", framework="pt") as file:
        names = set(file.keys())
    expected = {f"model.{name}" for name in names}
    expected |= {
        f"optimizer.{slot}.{n}" for n in names for slot in ("exp_avg", "exp_avg_sq", "step")
    }
    assert keys == expected
    metadata = json.loads((folder / "state.json").read_text())["metadata"]
    assert metadata["train_state"] | {"seconds": 0} == {
        "learning_rate": 0.002,
        "epoch": 3, "batch": 1, "step": 9, "skipped_steps": 0, "skipped_samples": 0, "seconds": 0,
    }  # fmt: skip
    assert metadata["best"] == read_lines(finished / "history.jsonl")[metadata["best"]["epoch"] - 1]
    assert metadata["config"]["seed"] == 42


@pytest.mark.parametrize("words", [(), ("--max-steps", "12"), ("--patience", "9")])
def test_a_finished_run_is_not_trained_evaluated_or_written_again(copied, capsys, words):
    before = tree(copied)
    assert train.main(["--resume", str(copied), *words]).exit_code == 0
    assert tree(copied) == before
    message = f"{copied} is finished; to train it further, raise --epochs"
    assert capsys.readouterr().out.splitlines() == [message]


def test_p7_a_run_that_skipped_its_steps_ends_in_an_error(tmp_path, monkeypatch):
    words = [*SMALL, "--on-nonfinite", "skip"]
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "get_total_norm", lambda _: torch.tensor(torch.nan))
        with pytest.raises(UserError, match="the model has not learned anything"):
            start(tmp_path, *words, name="skipped")
    with pytest.raises(UserError, match="the weights are not finite after epoch 1"):
        start(tmp_path, *words, "--lr", "1e30", name="diverged")
    for name in ("skipped", "diverged"):
        assert not (tmp_path / name / "report.json").exists()
    assert not (tmp_path / "diverged" / "best.safetensors").exists()


@pytest.mark.parametrize("name", ["report.json", "README.md"])  # the first and the last written
def test_p3_a_run_that_was_killed_at_its_end_is_finished(copied, finished, name):
    (copied / name).unlink()
    resume(copied)
    same_end(copied, finished)
    assert (copied / name).exists()


@pytest.mark.parametrize(
    ("progress", "options", "expected"),
    [
        ({"epoch": 9, "batch": 4}, {}, "--epochs"),
        ({"epoch": 9, "batch": 3}, {}, ""),
        ({"epoch": 5, "batch": 4}, {"patience": 3}, "--patience"),
        ({"epoch": 5, "batch": 4}, {"patience": 4}, ""),
        ({"epoch": 5, "batch": 3}, {"patience": 3}, ""),
        ({"epoch": 5, "batch": 3, "step": 19}, {"max_steps": 19}, "--max-steps"),
        ({"epoch": 5, "batch": 3, "step": 19}, {"max_steps": 20}, ""),
    ],
)
def test_the_option_that_ended_a_run_is_named(copied, progress, options, expected):
    checkpoint = manager.latest_checkpoint(run_dir.RunDir(copied))
    config = replace(checkpoint.config({}), epochs=9, **options)
    checkpoint.metadata["train_state"] |= progress
    checkpoint.metadata["best"]["epoch"] = 2
    assert checkpoint.reached_limit(config) == expected
    checkpoint.metadata["has_report"] = False
    assert checkpoint.reached_limit(config) == ""


def test_a_resumed_run_does_not_inherit_the_settings_of_a_call(copied):
    checkpoint = manager.latest_checkpoint(run_dir.RunDir(copied))
    of_call = {"timeout_seconds": 5, "quiet": True, "debug": True, "push_to_hub": "name"}
    checkpoint.metadata["config"] |= of_call
    config = checkpoint.config({})
    assert [getattr(config, name) for name in of_call] == [600, False, False, ""]


def test_a_resumed_run_keeps_its_precision(copied, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch would
    resume(copied, "--epochs", "4")
    assert json.loads((copied / "config.json").read_text())["precision"] == "float32"


def test_a_run_stopped_by_patience_is_finished(tmp_path, capsys):
    words = [*LENET, "--epochs", "9", "--lr", "1e-12", "--patience", "1"]
    start(tmp_path, *words)
    before = tree(tmp_path)
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "10"])
    assert "to train it further, raise --patience" in capsys.readouterr().out
    assert tree(tmp_path) == before
    resume(tmp_path / "run", "--patience", "2")
    epochs = [row["epoch"] for row in read_lines(tmp_path / "run" / "history.jsonl")]
    assert epochs == [1, 2, 3]


def test_resume_accepts_the_path_of_a_checkpoint(copied, finished):
    resume(copied / "checkpoints" / "step-00000012")
    same_end(copied, finished)
    with pytest.raises(UserError, match="step-00000008 is not the newest checkpoint of its run"):
        resume(copied / "checkpoints" / "step-00000008")


def test_a_finished_run_may_be_moved_and_trained_for_more_epochs(copied, tmp_path):
    moved = copied.rename(tmp_path / "elsewhere")
    resume(moved, "--epochs", "4")
    assert [row["epoch"] for row in read_lines(moved / "history.jsonl")] == [1, 2, 3, 4]
    config = json.loads((moved / "config.json").read_text())
    assert (config["output_dir"], config["name"], config["epochs"]) == (
        str(tmp_path), "elsewhere", 4,
    )  # fmt: skip


def test_auto_starts_a_run_and_resumes_it(tmp_path, capsys):
    command = [*LENET, "--resume", "auto"]
    command.remove("--quiet")
    start(tmp_path, *command, "--max-steps", "6")
    assert "resuming" not in capsys.readouterr().out
    start(tmp_path, *command)
    assert f"resuming from {tmp_path}/run/checkpoints/step-00000006" in capsys.readouterr().out
    assert len(read_lines(tmp_path / "run" / "steps.jsonl")) == 12


def test_auto_restarts_a_run_that_was_killed_before_its_first_checkpoint(
    tmp_path, monkeypatch, finished
):
    cut_off(monkeypatch, 1, lambda: start(tmp_path, *LENET, "--resume", "auto"))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    start(tmp_path, *LENET, "--resume", "auto")
    same_end(tmp_path / "run", finished)


# Other numbers of processes


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_p3_another_number_of_processes_counts_each_sample_once(tmp_path, num_processes):
    """A checkpoint of two processes, one of which skipped a step, is resumed on another number."""
    state = dict.fromkeys(TRAIN_STATE_TYPES, 0) | {"epoch": 2, "batch": 5, "step": 13}
    metadata = {"train_state": state, "totals": [[3.0, 2.0, 5.0], [4.0, 1.0, 4.0]]}
    checkpoint = Checkpoint(run_dir.RunDir(tmp_path), tmp_path, metadata, {})
    states = [checkpoint.train_state(rank, num_processes) for rank in range(num_processes)]
    assert sum(s.totals[0].item() for s in states) == 7
    assert sum(s.totals[1].item() for s in states) == 3
    assert min(s.totals[2].item() for s in states) == 4
    assert {(s.epoch, s.batch, s.step) for s in states} == {(2, 5, 13)}


def order(folder):
    """Return the indices of the samples of each step, over all processes."""
    logs = [read_lines(log) for log in sorted(folder.glob("order-*.jsonl"))]
    steps = {}
    for row in (row for log in logs for row in log):
        steps.setdefault(row["step"], []).extend(row["index"])
    return steps


def test_p3_stopped_on_two_processes_and_resumed_on_one_and_three(tmp_path):
    check, words = "tests/helpers/checks_resume.py", [*LENET, "--output-dir", tmp_path]
    logs = {name: tmp_path / "logs" / str(name) for name in ("whole", "first", 1, 3)}
    for folder in logs.values():
        folder.mkdir(parents=True)
    [whole] = run_world(1, check, logs["whole"], 0, 0, *words, "--name", "whole", limit=200)
    assert whole.code == 0, whole.stderr
    first, _ = run_world(2, check, logs["first"], 6, 0, *words, "--name", "first", limit=200)
    assert "stopped (SIGTERM) after step 6; resume with: python train.py --resume" in first.stderr
    expected = order(logs["whole"])
    assert sorted(expected) == list(range(12))
    losses = [row["loss"] for row in read_lines(tmp_path / "whole" / "steps.jsonl")]
    history = read_lines(tmp_path / "whole" / "history.jsonl")
    for size in (1, 3):
        shutil.copytree(tmp_path / "first", tmp_path / str(size))
        shutil.copytree(logs["first"], logs[size], dirs_exist_ok=True)
        words = ("--resume", tmp_path / str(size))
        for ended in run_world(size, check, logs[size], 0, 0, *words, limit=200):
            assert ended.code == 0, ended.stderr
        assert order(logs[size]) == expected
        resumed = read_lines(tmp_path / str(size) / "steps.jsonl")
        assert [row["loss"] for row in resumed] == pytest.approx(losses, rel=1e-4)
        rows = read_lines(tmp_path / str(size) / "history.jsonl")
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        for row, other in zip(rows, history, strict=True):  # every sample counts once
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_p7_a_loss_that_is_not_finite_on_one_process(tmp_path):
    """It ends all processes with an error that names it; or all skip that step and count it."""
    words = [*LENET, "--output-dir", tmp_path, "--checkpoint-every", "2", "--keep-checkpoints", "9"]
    check = ("tests/helpers/checks_resume.py", tmp_path, 0, "1:6", *words)
    ends = run_world(2, *check, "--name", "stopped", limit=200)
    assert [ended.code for ended in ends] == [2, 2]
    [error] = [error for ended in ends for error in ended.errors]
    assert error.startswith("error: the loss is nan at step 6 on process 1 (learning rate 0.002)")
    assert error.endswith(
        f"The last complete checkpoint of the run is {tmp_path}/stopped/checkpoints/step-00000004."
    )
    for ended in run_world(2, *check, "--on-nonfinite", "skip", "--name", "skipped", limit=200):
        assert ended.code == 0, ended.stderr
    history = read_lines(tmp_path / "skipped" / "history.jsonl")
    assert [row["skipped_steps"] for row in history] == [0, 1, 0]
    logged = read_lines(tmp_path / "skipped" / "steps.jsonl")
    assert [row["step"] for row in logged if row["loss"] is None] == [6]


@pytest.mark.slow
def test_p3_modules_with_a_version_are_resumed(tmp_path):
    """torchvision's MNASNet, whose layers depend on the version."""
    words = ["--model", "torchvision:mnasnet0_5", "--image-size", "32", "--epochs", "1"]
    start(tmp_path, *LENET, *words)
    resume(tmp_path / "run", "--epochs", "2")
    assert [row["epoch"] for row in read_lines(tmp_path / "run" / "history.jsonl")] == [1, 2]
