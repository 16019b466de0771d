"""P4, P5: a weights file is whole, no pickle, describes itself, and has the plain model's keys."""

import errno
import json
import math
import os
import pickletools
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from trainers import prepare

from lab.checkpoint import atomic_io, manager, run_dir, weights
from lab.config.recipes import resolve
from lab.data import DataConfig
from lab.data.splits import load_splits
from lab.distributed import build_accelerator
from lab.errors import UserError
from lab.models import build_model

CONFIG = resolve({"model": "lenet5", "dataset": "digits", "image_size": 28, "recipe": "smoke"})
ROW = {
    "epoch": 3,
    "train_loss": 0.5,
    "val_loss": 0.25,
    "val_accuracy": 0.75,
    "val_macro_f1": 0.7,
    "train_seconds": 1.5,
}


@pytest.fixture(scope="module")
def splits():
    return load_splits(DataConfig.of(CONFIG), math.inf, 1)


@pytest.fixture(scope="module")
def accelerator():
    return build_accelerator(mixed_precision="no", quiet=True)


def save_best(run, model, metadata, row):
    best = weights.BestWeights(run, manager.AsyncWriter())
    best.save(model, metadata, row)
    best.writer.wait()


def make_network(metadata, seed=0):
    torch.manual_seed(seed)
    return build_model(**metadata["model"]).eval()


@pytest.fixture
def saved(tmp_path, splits):
    """(a run's folder, the network in it)."""
    metadata = weights.run_metadata(CONFIG, splits, "no")
    run, model = run_dir.RunDir(tmp_path), make_network(metadata)
    save_best(run, model, metadata, ROW)
    return run, model


def logits(model):
    with torch.no_grad():
        return model(torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)))


def test_p5_the_file_alone_gives_the_same_logits(saved):
    run, model = saved
    metadata = weights.read_metadata(run.best)
    loaded = make_network(metadata, seed=1)
    assert not torch.equal(logits(loaded), logits(model))
    weights.load_weights(run.best, loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_p5_metadata_holds_all_that_is_needed(saved, splits):
    metadata = weights.read_metadata(saved[0].best)
    assert metadata["model"] == {
        "name": "lenet5", "num_classes": 10, "in_chans": 1, "image_size": 28,
    }  # fmt: skip
    assert DataConfig(**metadata["data"]) == DataConfig.of(CONFIG)
    assert metadata["class_names"] == list("0123456789")
    assert (tuple(metadata["mean"]), tuple(metadata["std"])) == (splits.mean, splits.std)
    assert metadata["best_epoch"] == 3
    assert metadata["metrics"] == {"val_loss": 0.25, "val_accuracy": 0.75, "val_macro_f1": 0.7}
    assert (metadata["monitor"], metadata["selection_split"]) == ("accuracy", "validation")
    assert (metadata["seed"], metadata["recipe"], metadata["precision"]) == (42, "smoke", "no")
    assert torch.__version__.startswith(metadata["versions"]["torch"].split("+")[0])
    assert metadata["versions"].keys() == {
        "lab", "python", "torch", "torchvision", "pillow", "accelerate", "safetensors",
    }  # fmt: skip


def test_p4_the_file_is_safetensors_with_json(saved):
    content = saved[0].best.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert list(header["__metadata__"]) == ["lab"]
    assert json.loads(header["__metadata__"]["lab"])["format"] == 1
    with pytest.raises(ValueError):  # no pickle
        list(pickletools.genops(content))


def keys(path):
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    "settings", [{"ema_decay": 0.5}, {"compile": True}, {"ema_decay": 0.5, "compile": True}]
)
@pytest.mark.parametrize("model", ["lenet5"])
def test_p5_no_wrapper_leaks_into_the_keys(
    tmp_path, accelerator, splits, settings, model, monkeypatch
):
    monkeypatch.setenv("CXX", sys.executable)  # no compiler is needed before the first step
    config = resolve({"model": model, "dataset": "digits", "recipe": "smoke", **settings})
    metadata = weights.run_metadata(config, splits, "no")
    built_model = build_model(**metadata["model"])
    expected = set(built_model.state_dict())
    train_step = prepare(accelerator, built_model, config)
    assert (train_step.eval_model is train_step.model) == ("ema_decay" not in settings)
    run = run_dir.RunDir(tmp_path)
    save_best(run, train_step.eval_model, metadata, ROW)
    assert keys(run.best) == expected
    weights.load_weights(run.best, build_model(**metadata["model"]))


def test_p5_the_same_weights_give_the_same_bytes(saved, tmp_path, splits):
    run, model = saved
    metadata = weights.run_metadata(CONFIG, splits, "no")
    first = run.best.read_bytes()
    again = dict(reversed(metadata.items()))
    save_best(run, model, again, ROW | {"train_seconds": 99.0})
    assert run.best.read_bytes() == first
    save_best(run, model, metadata, ROW | {"val_loss": 0.26})
    assert run.best.read_bytes() != first


def test_only_the_main_process_writes(tmp_path, splits):
    metadata = weights.run_metadata(CONFIG, splits, "no")
    run = run_dir.RunDir(tmp_path, is_main_process=False)
    save_best(run, make_network(metadata), metadata, ROW)
    run.create({})
    run.write_report({})
    run.write_predictions(b"index,label,prediction,confidence\n0,1,1,0.500000\n", None)
    run.add_epoch({})
    run.add_steps([{}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["replace", "fsync", "write"])
def test_p3_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch, broken):
    run, model = saved
    first = run.best.read_bytes()

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(run_dir.os, broken, full)
    metadata = weights.read_metadata(run.best)
    with pytest.raises(ValueError, match=r"cannot write .*best\.safetensors \(No space left"):
        weights.write_weights(run.best, weights.copy_of(model), metadata | {"seed": 1})
    monkeypatch.undo()
    assert run.best.read_bytes() == first
    assert [p.name for p in run.path.iterdir()] == ["best.safetensors"]
    weights.write_weights(run.best, weights.copy_of(model), metadata | {"seed": 1})
    assert weights.read_metadata(run.best)["seed"] == 1


def test_p3_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls, descriptors = [], []
    replace, fsync = os.replace, os.fsync

    def watched_replace(source, target):
        assert Path(source).read_bytes() == b"content"
        assert Path(source).parent == Path(target).parent  # else it would not be atomic
        calls.append("replace")
        replace(source, target)

    def watched_fsync(descriptor):
        calls.append("sync")
        descriptors.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(run_dir.os, "fsync", watched_fsync)
    monkeypatch.setattr(run_dir.os, "replace", watched_replace)
    atomic_io.write_atomically(tmp_path / "x", b"content")
    assert calls == ["sync", "replace", "sync"]  # the second: of the folder
    assert (tmp_path / "x").read_bytes() == b"content"
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_best_weights_are_those_of_the_moment_they_were_saved(
    tmp_path, splits, accelerator, monkeypatch
):
    trained_on, write = threading.Event(), weights.write_weights
    monkeypatch.setattr(
        weights, "write_weights", lambda *given: (trained_on.wait(60), write(*given))
    )
    metadata = weights.run_metadata(CONFIG, splits, "no")
    model = make_network(metadata)
    expected = logits(model)
    best = weights.BestWeights(run_dir.RunDir(tmp_path), manager.AsyncWriter())
    best.save(model, metadata, ROW)
    with torch.no_grad():  # training goes on before the file is written
        for tensor in model.parameters():
            tensor.zero_()
    trained_on.set()
    best.load(accelerator, model)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="the weights are not finite after epoch"):
        best.save(model, metadata, ROW)
    best.load(accelerator, model)  # the file is not replaced
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_a_checkpoint_is_a_copy_that_training_does_not_change(accelerator, optimizer):
    settings = {"ema_decay": 0.5, "optimizer": optimizer, "momentum": 0.9}
    config = resolve({"model": "lenet5", "dataset": "digits", "recipe": "smoke", **settings})
    model = build_model("lenet5", num_classes=10, in_chans=1, image_size=28)
    train_step = prepare(accelerator, model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    train_step.optimizer.step()
    copied = manager.state_dict(train_step)
    before = {name: tensor.clone() for name, tensor in copied.items()}
    assert {name.split(".")[0] for name in copied} == {"model", "ema", "optimizer"}
    train_step.optimizer.step()
    train_step.ema.update(model, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.items())
    assert not all(map(torch.equal, manager.state_dict(train_step).values(), before.values()))


def test_p7_a_write_that_failed_in_the_background_is_told(tmp_path, splits):
    metadata = weights.run_metadata(CONFIG, splits, "no")
    best = weights.BestWeights(run_dir.RunDir(tmp_path / "gone"), manager.AsyncWriter())
    best.save(make_network(metadata), metadata, ROW)
    with pytest.raises(UserError, match="cannot write"):
        best.writer.wait()


def test_p3_a_file_system_that_cannot_sync_directories_is_written_to(tmp_path, monkeypatch):
    """Such as VirtualBox's shared folders. Any other error is the user's to know."""
    original, code = os.fsync, errno.EINVAL

    def fsync(descriptor, on_files=False):
        if on_files or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_io.write_atomically(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"
    code = errno.EIO
    with pytest.raises(UserError, match="Input/output error"):
        atomic_io.write_atomically(tmp_path / "x", "other")
    code = errno.EINVAL
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsync(descriptor, on_files=True))
    with pytest.raises(UserError, match="Invalid argument"):
        atomic_io.write_atomically(tmp_path / "x", "other")


def test_the_name_of_a_run_is_utf8_as_weights_are_only_read_from_such_paths(tmp_path):
    config = replace(CONFIG, dataset=str(tmp_path / "nu\udcff"), output_dir=str(tmp_path))
    run = run_dir.open_new(config)
    assert run.path == tmp_path / "lenet5-nu"
    run.close()


@pytest.mark.parametrize(("resume", "name"), [("", "run"), ("auto", "run"), ("", "")])
def test_p3_a_run_that_another_process_trained_before_the_lock_is_kept(
    tmp_path, monkeypatch, resume, name
):
    config = resolve({"model": "lenet5", "dataset": "digits", "output_dir": str(tmp_path)})
    config, lock = replace(config, resume=resume, name=name), run_dir.RunDir.lock
    other_config = replace(config, name=name or "lenet5-digits")

    def lock_later(run):
        monkeypatch.setattr(run_dir.RunDir, "lock", lock)
        other = run_dir.open_new(other_config)
        other.create({})
        (other.checkpoints_dir / "step-00000001").mkdir()
        other.close()
        run.lock()

    monkeypatch.setattr(run_dir.RunDir, "lock", lock_later)
    if name and not resume:
        with pytest.raises(UserError, match="exists"):
            run_dir.open_new(config)
    else:
        run = run_dir.open_new(config)
        assert [path.name for path in run.checkpoints] == (["step-00000001"] if resume else [])
        assert run.path.name == (name or "lenet5-digits-2")
        run.close()
    assert (tmp_path / other_config.name / "checkpoints/step-00000001").is_dir()


def test_overwriting_a_run_removes_a_link_but_not_what_it_points_to(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    run = run_dir.RunDir(tmp_path / "run")
    run.make_directory()
    run.lock()
    run.create({})
    (run.path / "link").symlink_to(tmp_path / "images", target_is_directory=True)
    run.create({})
    run.close()
    assert not (run.path / "link").is_symlink()
    assert (tmp_path / "images" / "a.png").exists()


def test_p3_a_run_that_was_killed_while_it_replaced_another_can_be_replaced(copied, monkeypatch):
    run = run_dir.RunDir(copied)
    run.lock()
    monkeypatch.setattr(run, "_write_config", lambda settings: sys.exit())
    with pytest.raises(SystemExit):
        run.create({})
    assert sorted(path.name for path in copied.iterdir()) == ["checkpoints", "config.json"]
    assert run_dir.is_run(copied)
    run.close()
