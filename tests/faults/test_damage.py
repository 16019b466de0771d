"""P3, P4 and P7: files of a run that are damaged, of unknown origin, or contain a pickle."""

import hashlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import ROOT

import evaluate
import train
from lab.checkpoint import run_dir, train_state
from lab.errors import run_script

WORDS = ["--dataset", "digits", "--recipe", "smoke", "--quiet", "--threads", "1"]
KINDS = ["halved", "emptied", "random", "flipped", "deleted", "pickle", "torch.save"]
MARKER = "marker"


class Payload:
    """Creates a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a run with checkpoints of steps 12, 13 and 14, in its second epoch."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["--max-steps", "14", "--checkpoint-every", "1", "--keep-checkpoints", "3"]
    train.main([*WORDS, *words, "--output-dir", str(folder), "--name", "run"])
    paths = sorted((folder / "run/checkpoints").glob("step-*"))
    assert [path.name[-2:] for path in paths] == ["12", "13", "14"]
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """Return a copy of it in the current directory; no payload may run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    yield Path("run")
    assert not Path(MARKER).exists()


def damage(path: Path, kind: str) -> None:
    content, chosen = path.read_bytes(), random.Random(0)
    if kind == "deleted":
        path.unlink()
    elif kind == "torch.save":
        torch.save({"model": Payload()}, path)
    else:
        at = len(content) * 2 // 3
        flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        path.write_bytes(
            {
                "halved": content[: len(content) // 2],
                "emptied": b"",
                "random": chosen.randbytes(len(content)),
                "flipped": flipped,
                "pickle": pickle.dumps(Payload()),
            }[kind]
        )


def seal(folder: Path, state: object = None) -> None:
    """Set the checksums of a checkpoint to those of its content, as anybody can."""
    path = folder / "state.json"
    state = json.loads(path.read_bytes())["metadata"] if state is None else state
    if isinstance(state, dict):
        content = (folder / "tensors.safetensors").read_bytes()
        state["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"metadata": state, "sha256": digest}))


def call(capfd, script, *words: object) -> tuple[int, list[str], list[str]]:
    """Return the exit code, warnings and errors of a script, which must print no traceback."""

    def main() -> int:
        result = script.main([str(word) for word in words])
        return getattr(result, "exit_code", result)

    capfd.readouterr()
    code = run_script(main)
    lines = capfd.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    errors = [line for line in lines if line.startswith("error: ")]
    assert sorted(lines) == sorted(warnings + errors)
    return code, warnings, errors


def test_the_payload_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert Path(MARKER).exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [train_state.METADATA_FILE, train_state.TENSORS_FILE])
def test_p3_damage_to_a_checkpoint_is_noticed(run, name, kind):
    folder = run / "checkpoints/step-00000014"
    damage(folder / name, kind)
    with pytest.raises(train_state.CorruptCheckpointError):
        train_state.read_checkpoint(folder)


def test_p3_a_damaged_checkpoint_is_replaced_by_the_one_before(run, capfd):
    damage(run / "checkpoints/step-00000014/tensors.safetensors", "flipped")
    code, warnings, errors = call(capfd, train, "--resume", run, "--quiet", "--max-steps", 15)
    assert (code, errors) == (0, [])
    [warning] = warnings
    assert warning.startswith("warning: the checkpoint run/checkpoints/step-00000014 is damaged (")
    assert run_dir.RunDir(run).checkpoints[0].name == "step-00000015"


@pytest.mark.parametrize("how", ["--resume run", "--resume auto --name run --output-dir ."])
def test_p7_no_complete_checkpoint_is_one_error(run, capfd, how):
    for number, folder in enumerate(sorted((run / "checkpoints").glob("step-*"))):
        damage(folder / (train_state.METADATA_FILE, train_state.TENSORS_FILE)[number % 2], "halved")
    code, warnings, errors = call(capfd, train, *how.split(), "--quiet")
    assert code == 2
    assert len(warnings) == 3
    [error] = errors
    assert error == "error: no checkpoint of run is complete. Start a new run."
    assert len(list((run / "checkpoints").glob("step-*"))) == 3  # none is removed


@pytest.mark.parametrize("kind", KINDS)
def test_p7_damaged_best_weights_are_reported_at_once(run, capfd, kind):
    damage(run / "best.safetensors", kind)
    code, _, [error] = call(capfd, evaluate, run, "--quiet")
    assert code == 2
    problem = "run/best.safetensors is damaged, or is not a weights file of train.py ("
    assert error.startswith(f"error: {'run contains no best' if kind == 'deleted' else problem}")
    if kind not in ("flipped", "deleted"):
        return
    code, warnings, errors = call(capfd, train, "--resume", run, "--quiet", "--max-steps", 15)
    assert (code, errors) == (0, [])
    [warning] = warnings
    if kind == "deleted":
        problem = "there is no file run/best.safetensors. "
    assert warning.startswith(f"warning: {problem}")
    assert warning.endswith("The best epoch is selected again.")
    assert call(capfd, evaluate, run, "--quiet") == (0, [], [])


# Checkpoints of unknown origin with valid checksums.


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_p4_a_pickle_is_never_read(run, capfd, kind):
    for folder in (run / "checkpoints").glob("step-*"):
        damage(folder / train_state.TENSORS_FILE, kind)
        seal(folder)
    code, warnings, [error] = call(capfd, train, "--resume", run, "--quiet")
    assert code == 2
    assert all("tensors.safetensors: " in warning for warning in warnings)
    assert error == "error: no checkpoint of run is complete. Start a new run."


def test_p4_a_run_is_written_and_read_without_pickle(run, capfd, monkeypatch):
    """No function of pickle may be called, not even by a library."""

    def refuse(*_, **__):
        raise AssertionError("a pickle is read or written")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    words = ("--resume", run, "--quiet", "--max-steps", 15)
    assert call(capfd, train, *words) == (0, [], [])
    words = ("--max-steps", 2, "--checkpoint-every", 1, "--output-dir", ".", "--name", "new")
    assert call(capfd, train, *WORDS, *words) == (0, [], [])
    assert call(capfd, evaluate, "new", "--quiet") == (0, [], [])


def test_p4_pickles_in_a_checkpoint_are_ignored(run, capfd):
    for folder in (run, run / "checkpoints", run / "checkpoints/step-00000014"):
        for name in ("optimizer.pt", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"):
            torch.save(Payload(), folder / name)
    words = ("--resume", run, "--quiet", "--max-steps", 15)
    assert call(capfd, train, *words) == (0, [], [])
    assert call(capfd, evaluate, run, "--quiet") == (0, [], [])


HUGE = 10**400
HOSTILE = [
    *({key: value} for key in ("train_state", "totals", "best", "config", "fingerprints",
      "precision", "format", "scaler") for value in (..., 5, {"a": {}})),
    *({f"train_state.{key}": value} for key in train_state.TRAIN_STATE_TYPES
      for value in (..., "1", -1, 1.5, HUGE, math.nan)),
    {"train_state.code": 1},
    {"train_state.batch": 10**9},
    {"train_state.step": 2**52},
    {"train_state.epoch": 0},
    *({"totals": value} for value in ([], [[]], [[1.0, 2.0]], [[1.0, 2.0, "x"]], [[HUGE, 1.0, 1.0]],
      [[math.nan] * 3], [None], [[[1.0]] * 3], [[1.0] * 3, [1.0]], [[1.0] * 3] * 1000)),
    *({f"config.{key}": value} for key in ("model", "dataset", "epochs", "lr", "augment", "name",
      "batch_size", "seed", "mixed_precision", "image_size")
      for value in (None, "\x1b[31m../../x", math.nan, HUGE)),
    {"config.model": "os.system"},
    {"config.dataset": "../../etc"},
    {"config.recipe": "nosuch"},
    {"config.model": "alexnet"},
    {"config.code": 1},
    {"config.optimizer": "sgd"},
    {"config.ema_decay": 0.5},
    {"config.output_dir": "/nosuch", "config.name": "elsewhere", "config.resume": "other"},
    {"config.model": ...},
    {"config.epochs": ...},
    {"best.epoch": "x"},
    {"best.val_accuracy": ...},
    {"best.val_accuracy": "x"},
    {"fingerprints.train": ["x"]},
    {"precision": "fp16"},
    {"scaler": {"scale": 1.0}},
]  # fmt: skip


def changed(state: dict, change: dict) -> dict:
    for key, value in change.items():
        *groups, name = key.split(".")
        group = state[groups[0]] if groups else state
        group[name] = value
        if value is ...:
            del group[name]
    return state


@pytest.mark.slow
def test_p7_a_hostile_checkpoint_is_one_error_or_resumed(run, capfd, finished):
    checkpoints, wrong = run / "checkpoints", []
    for change in HOSTILE:
        shutil.rmtree(checkpoints)
        path = checkpoints / "step-00000014"
        shutil.copytree(finished / "checkpoints/step-00000014", path)
        metadata = json.loads((path / train_state.METADATA_FILE).read_bytes())["metadata"]
        seal(path, changed(metadata, change))
        try:
            words = ("--resume", run, "--quiet", "--max-steps", 15, "--patience", 5)
            code, _, errors = call(capfd, train, *words)
            assert (code == 2 and len(errors) == 1) or (code == 0 and not errors)
        except BaseException as error:
            wrong.append((change, repr(error)[:2000]))
    assert not wrong, wrong


def test_p7_invalid_metadata_of_a_checkpoint_are_damage(run):
    folder = run / "checkpoints/step-00000014"
    contents = (
        b"[", b"[]", b"{}", b"null", b"5", b'"x"', b"[" * 100_000, b'{"metadata": {}, "sha256": 5}',
        b'{"metadata": [], "sha256": {}}', b"\xff\xfe", b'{"a": ' * 50_000, b"1" * 10_000,
    )  # fmt: skip
    for content in contents:
        (folder / train_state.METADATA_FILE).write_bytes(content)
        with pytest.raises(train_state.CorruptCheckpointError):
            train_state.read_checkpoint(folder)


def test_p7_optimizer_state_of_another_architecture_is_one_error(run, capfd):
    folder, words = (
        run / "checkpoints/step-00000014",
        ("--resume", run, "--quiet", "--max-steps", 15),
    )
    tensors = train_state.read_checkpoint(folder)[1]
    name = "optimizer.exp_avg.features.0.weight"
    for value in (None, torch.zeros(3), torch.zeros(())):
        changed_tensors = {k: v for k, v in (tensors | {name: value}).items() if v is not None}
        content = train_state.safetensors.torch.save(changed_tensors)
        (folder / train_state.TENSORS_FILE).write_bytes(content)
        seal(folder)
        code, _, [error] = call(capfd, train, *words)
        assert (code, error) == (
            2, "error: run holds the checkpoint of another architecture. Start a new run.",
        )  # fmt: skip
    # Unknown optimizer state is ignored.
    tensors |= {"optimizer.x": torch.zeros(1), "optimizer.code.features.0.weight": value}
    content = train_state.safetensors.torch.save(tensors)
    (folder / train_state.TENSORS_FILE).write_bytes(content)
    seal(folder)
    assert call(capfd, train, *words) == (0, [], [])


@pytest.mark.slow
def test_p7_randomly_changed_files_never_crash_the_readers(finished):
    """300 files, in a process whose memory is limited to one GiB more than it starts with."""
    command = [sys.executable, "tests/helpers/checks_fuzz.py", str(finished), "150"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["weights refused"] + counts["weights loaded"] == 150
    assert counts["checkpoints refused"] + counts["checkpoints loaded"] == 150
    assert min(counts["weights refused"], counts["checkpoints refused"]) > 75
    assert counts["MiB more"] < 1024
