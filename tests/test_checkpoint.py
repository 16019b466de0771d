"""P4, P5: a weights file is whole, no pickle, describes itself, and has the plain model's keys."""

import errno
import json
import math
import os
import pickletools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lab import checkpoint, rundir
from lab.data import DataConfig, load_splits
from lab.distributed import build_accelerator
from lab.engine import prepare
from lab.errors import UserError
from lab.models import build_model
from lab.recipes import resolve

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


def save_best(run, network, about, row):
    best = checkpoint.BestWeights(run, checkpoint.Writer())
    best.save(network, about, row)
    best.writer.wait()


def make_network(about, seed=0):
    torch.manual_seed(seed)
    return build_model(**about["model"]).eval()


@pytest.fixture
def saved(tmp_path, splits):
    """(a run's folder, the network in it)."""
    about = checkpoint.about_run(CONFIG, splits, "no")
    run, network = rundir.RunDir(tmp_path), make_network(about)
    save_best(run, network, about, ROW)
    return run, network


def logits(network):
    with torch.no_grad():
        return network(torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)))


def test_p5_the_file_alone_gives_the_same_logits(saved):
    run, network = saved
    about = checkpoint.read_info(run.best)
    loaded = make_network(about, seed=1)
    assert not torch.equal(logits(loaded), logits(network))
    checkpoint.load_weights(run.best, loaded)
    assert torch.equal(logits(loaded), logits(network))


def test_p5_class_names_are_read_in_composed_form(saved, splits):
    """As class folders are listed, whichever form the weights were written with."""
    run, network = saved
    about = checkpoint.about_run(CONFIG, splits, "no")
    names = ("cafe\u0301", "caf\u00e8", *"23456789")
    save_best(run, network, {**about, "class_names": names}, ROW)
    found = checkpoint.read_info(run.best)["class_names"]
    assert found == ["caf\u00e9", "caf\u00e8", *"23456789"]


def test_p5_metadata_holds_all_that_is_needed(saved, splits):
    about = checkpoint.read_info(saved[0].best)
    assert about["model"] == {
        "name": "lenet5", "num_classes": 10, "channels": 1, "image_size": 28,
    }  # fmt: skip
    assert DataConfig(**about["data"]) == DataConfig.of(CONFIG)
    assert about["class_names"] == list("0123456789")
    assert (tuple(about["mean"]), tuple(about["std"])) == (splits.mean, splits.std)
    assert about["best_epoch"] == 3
    assert about["metrics"] == {"val_loss": 0.25, "val_accuracy": 0.75, "val_macro_f1": 0.7}
    assert (about["select_by"], about["selected_on"]) == ("accuracy", "validation")
    assert (about["seed"], about["recipe"], about["precision"]) == (42, "smoke", "no")
    assert torch.__version__.startswith(about["versions"]["torch"].split("+")[0])
    assert about["versions"].keys() == {
        "lab", "python", "torch", "torchvision", "accelerate", "safetensors",
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


def test_p5_keys_are_the_plain_networks(saved):
    run, network = saved
    assert keys(run.best) == network.state_dict().keys()
    assert "features.0.weight" in keys(run.best)


@pytest.mark.parametrize(
    "settings", [{"ema": 0.5}, {"compile": True}, {"ema": 0.5, "compile": True}]
)
@pytest.mark.parametrize("model", ["lenet5", "alexnet"])
def test_p5_no_wrapper_leaks_into_the_keys(tmp_path, accelerator, splits, settings, model):
    config = resolve({"model": model, "dataset": "digits", "recipe": "smoke", **settings})
    about = checkpoint.about_run(config, splits, "no")
    network = build_model(**about["model"])
    expected = set(network.state_dict())
    trainer = prepare(accelerator, network, config)
    assert (trainer.evaluated is trainer.network) == ("ema" not in settings)
    run = rundir.RunDir(tmp_path)
    save_best(run, trainer.evaluated, about, ROW)
    assert keys(run.best) == expected
    checkpoint.load_weights(run.best, build_model(**about["model"]))


def test_the_average_is_apart_from_the_network_and_starts_as_it(accelerator, splits):
    config = resolve({"dataset": "digits", "recipe": "smoke", "ema": 0.9})
    network = build_model(**checkpoint.about_run(config, splits, "no")["model"])
    trainer = prepare(accelerator, network, config)
    assert torch.equal(trainer.evaluated.features[0].weight, network.features[0].weight)
    with torch.no_grad():
        network.features[0].weight.zero_()
    assert trainer.evaluated.features[0].weight.any()


def test_p5_the_same_weights_give_the_same_bytes(saved, tmp_path, splits):
    run, network = saved
    about = checkpoint.about_run(CONFIG, splits, "no")
    first = run.best.read_bytes()
    again = dict(reversed(about.items()))
    save_best(run, network, again, ROW | {"train_seconds": 99.0})
    assert run.best.read_bytes() == first
    save_best(run, network, about, ROW | {"val_loss": 0.26})
    assert run.best.read_bytes() != first


def test_weights_in_any_memory_format_are_saved_alike(saved):
    run, network = saved
    first = run.best.read_bytes()
    about = checkpoint.read_info(run.best)
    checkpoint.write_weights(run.best, checkpoint.copy_of(network), about)
    plain = run.best.read_bytes()
    checkpoint.write_weights(
        run.best, checkpoint.copy_of(network.to(memory_format=torch.channels_last)), about
    )
    assert run.best.read_bytes() == plain == first


def test_only_the_main_process_writes(tmp_path, splits):
    about = checkpoint.about_run(CONFIG, splits, "no")
    run = rundir.RunDir(tmp_path, writes=False)
    save_best(run, make_network(about), about, ROW)
    run.begin({})
    run.write_report({})
    run.write_predictions(b"index,label,prediction,confidence\n0,1,1,0.500000\n")
    run.add_epoch({})
    run.add_steps([{}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["replace", "fsync", "write"])
def test_p3_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch, broken):
    run, network = saved
    first = run.best.read_bytes()

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if broken == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(rundir.os, broken, full)
    about = checkpoint.read_info(run.best)
    with pytest.raises(ValueError, match=r"cannot write .*best\.safetensors \(No space left"):
        checkpoint.write_weights(run.best, checkpoint.copy_of(network), about | {"seed": 1})
    monkeypatch.undo()
    assert run.best.read_bytes() == first
    assert [p.name for p in run.path.iterdir()] == ["best.safetensors"]
    checkpoint.write_weights(run.best, checkpoint.copy_of(network), about | {"seed": 1})
    assert checkpoint.read_info(run.best)["seed"] == 1


def test_p3_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    replace, fsync = os.replace, os.fsync

    def watched_replace(source, target):
        assert Path(source).read_bytes() == b"content"
        assert Path(source).parent == Path(target).parent  # else it would not be atomic
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(rundir.os, "fsync", lambda n: (calls.append("sync"), fsync(n)))
    monkeypatch.setattr(rundir.os, "replace", watched_replace)
    rundir.write_atomically(tmp_path / "x", lambda path: path.write_bytes(b"content"))
    assert calls == ["sync", "replace", "sync"]  # the second: of the folder
    assert (tmp_path / "x").read_bytes() == b"content"


def test_p5_weights_are_found_by_their_run_or_their_name(saved):
    run, _ = saved
    assert checkpoint.find_weights(str(run.path)) == run.best
    assert checkpoint.find_weights(str(run.best)) == run.best


def test_best_weights_load_what_they_saved(saved, accelerator):
    run, network = saved
    other = make_network(checkpoint.read_info(run.best), seed=5)
    checkpoint.BestWeights(run, checkpoint.Writer()).load(accelerator, other)
    assert torch.equal(logits(other), logits(network))


def test_best_weights_are_those_of_the_moment_they_were_saved(tmp_path, splits, accelerator):
    about = checkpoint.about_run(CONFIG, splits, "no")
    network = make_network(about)
    expected = logits(network)
    best = checkpoint.BestWeights(rundir.RunDir(tmp_path), checkpoint.Writer())
    best.save(network, about, ROW)
    with torch.no_grad():  # training goes on before the file is written
        for tensor in network.parameters():
            tensor.zero_()
    best.load(accelerator, network)
    assert torch.equal(logits(network), expected)


def test_p7_a_write_that_failed_in_the_background_is_told(tmp_path, splits):
    about = checkpoint.about_run(CONFIG, splits, "no")
    best = checkpoint.BestWeights(rundir.RunDir(tmp_path / "gone"), checkpoint.Writer())
    best.save(make_network(about), about, ROW)
    with pytest.raises(UserError, match="cannot write"):
        best.writer.wait()


def test_p5_modules_that_ask_for_their_version_are_loaded(splits, tmp_path):
    """torchvision's MNASNet, whose layers differ between two of them."""
    config = replace(CONFIG, model="torchvision:mnasnet0_5")
    about = checkpoint.about_run(config, splits, "no") | {"best_epoch": 1}
    network, loaded = (build_model(**about["model"]) for _ in range(2))
    checkpoint.write_weights(tmp_path / "w", checkpoint.copy_of(network), about)
    checkpoint.load_weights(tmp_path / "w", loaded)
    assert checkpoint.checksum(loaded.state_dict()) == checkpoint.checksum(network.state_dict())
