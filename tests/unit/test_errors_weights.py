"""P4, P7: weights files that are damaged, of unknown origin, or do not match the data."""

import json
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from mistakes import NO_FOLDER, make_picture, matches
from safetensors.torch import save
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
from lab.checkpoint import weights
from lab.checkpoint.run_dir import RunDir
from lab.config import recipes
from lab.config.schema import EvalConfig
from lab.data import DataConfig
from lab.data.splits import load_splits
from lab.errors import UserError
from lab.models import build_model

HINT = "Give a weights file that train.py wrote."


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[dict, bytes]:
    """Return the metadata and the file content of LeNet-5 on digits, as a run writes them."""
    config = recipes.resolve({"model": "lenet5", "dataset": "digits", "recipe": "smoke"})
    metadata = weights.run_metadata(config, load_splits(DataConfig.of(config), math.inf, 1), "no")
    metadata |= {"best_epoch": 1, "metrics": {}}
    path = tmp_path_factory.mktemp("trained") / "best.safetensors"
    weights.write_weights(path, weights.copy_of(build_model(**metadata["model"])), metadata)
    return metadata, path.read_bytes()


def with_metadata(content: bytes, metadata: dict | None) -> bytes:
    """Return a safetensors file with its metadata replaced."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = metadata or {}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: weights. See `python evaluate.py --help`."),
        ("nosuch", "there is no file nosuch. Give a run's directory or its best.safetensors."),
        (
            "n" * 300,
            f"there is no file {'n' * 300}. Give a run's directory or its best.safetensors.",
        ),
        (".", ". contains no best.safetensors. Give the directory of a finished run."),
        ("w --split vla", "invalid --split 'vla': expected one of test, val, train, all."),
        ("w --dataset minst", "unknown dataset minst. Did you mean mnist?"),
        (
            "w --data-dir rgb",
            "digits is not read from --data-dir rgb. "
            "Leave it out; for a directory of images, give --dataset DIRECTORY.",
        ),
        (
            "w --dataset other",
            "the data have classes that w was not trained on: "
            "a, b, c, d, e and 2 more. "
            "Give a --dataset with classes that it was trained on.",
        ),
        (
            "w --dataset rgb",
            "w takes images with 1 channels, but the data have 3. "
            "Give data with that many channels.",
        ),
        ("w --output w", f"cannot write w (File exists). {NO_FOLDER}"),
        (
            f"w --output {'n' * 300}",
            f"cannot write {'n' * 300} (File name too long). Give a shorter name.",
        ),
    ],
)
def test_p7_evaluate_refuses(fails, tmp_path, trained, words, message):
    (tmp_path / "w").write_bytes(trained[1])
    for digit in range(10):
        for i in range(3):
            make_picture(tmp_path / f"rgb/{digit}/{i}.png")
            for name in "abcdefg":
                make_picture(tmp_path / f"other/{name}/{i}.png")
    assert fails(evaluate, *words.split(), "--quiet") == message


def test_p7_the_dataset_of_the_training_has_moved(fails, tmp_path, trained):
    metadata = trained[0] | {"data": trained[0]["data"] | {"dataset": "mine"}}
    model = build_model(**metadata["model"])
    weights.write_weights(tmp_path / "w", weights.copy_of(model), metadata)
    assert fails(evaluate, "w", "--quiet") == (
        "there is no directory mine, the dataset of the training. Give --dataset with its path."
    )


def zipped(content: bytes) -> bytes:
    with zipfile.ZipFile("z", "w") as file:
        file.writestr("archive/data.pkl", content)
    content = Path("z").read_bytes()
    Path("z").unlink()
    return content


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: b"x" * 10 + content[10:],
        lambda content: content[:8] + b"x" * 10 + content[18:],
        lambda content: pickle.dumps({"state_dict": [1.0] * 100}),
        lambda content: save({"weight": torch.zeros(3)}, {"format": "pt"}),
        lambda content: with_metadata(content, None),
        zipped,
    ],
)
def test_p7_a_damaged_or_other_file_is_named(fails, tmp_path, trained, damage):
    os.chdir(tmp_path)
    (tmp_path / "w").write_bytes(damage(trained[1]))
    message = fails(evaluate, "w", "--quiet")
    assert matches(
        message,
        "w is damaged, or is not a weights file of train.py (*). "
        "Give a run's directory or its best.safetensors.",
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("{", "*"),
        ("[" * 100_000, "*"),
        ({"model": ...}, "model is missing"),
        ({"model.name": "os.system"}, "unknown model os.system"),
        ({"model.num_classes": 10**9}, "class_names contradicts the rest"),
        ({"model.in_chans": 3}, "mean contradicts the rest"),
        ({"model.image_size": 64}, "image_size contradicts the rest"),
        ({"data": ...}, "data is missing"),
        ({"data.val_fraction": 5}, "invalid --val-fraction 5"),
        ({"data.split_seed": ...}, "*"),
        ({"class_names": [*"012345678", "\ud800"]}, "*"),
        ({"mean": [10**400]}, "*"),
        ({"std": [math.nan]}, "std contradicts the rest"),
        ({"temperature": 0}, "temperature contradicts the rest"),
        ({"precision": "fp8"}, "invalid --mixed-precision 'fp8'"),
        ({"selection_split": ...}, "selection_split is missing"),
    ],
)
def test_p7_metadata_of_unknown_origin_are_checked(fails, tmp_path, trained, change, reason):
    metadata, content = trained
    header = {"lab": change}
    if isinstance(change, dict):
        changed = json.loads(json.dumps({"format": weights.FORMAT, **metadata}))
        for key, value in change.items():
            *groups, name = key.split(".")
            group = changed[groups[0]] if groups else changed
            group[name] = value
            if value is ...:
                del group[name]
        header = {"lab": json.dumps(changed)}
    (tmp_path / "w").write_bytes(with_metadata(content, header))
    message = fails(evaluate, "w", "--quiet")
    assert matches(message, f"w has invalid metadata ({reason}). {HINT}")


def test_p7_weights_of_a_newer_format_say_so(fails, tmp_path, trained):
    (tmp_path / "w").write_bytes(with_metadata(trained[1], {"lab": '{"format": 2}'}))
    assert fails(evaluate, "w") == "w has format 2, not 1. Use a newer version of lab."


class Largest(TorchDispatchMode):
    """Record the size of the largest tensor that is allocated."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


def test_p4_a_small_file_that_names_many_classes_is_refused_before_memory_is_taken(
    tmp_path, trained
):
    metadata, content = trained
    names = [str(k) for k in range(300_000)]
    changed = {"format": weights.FORMAT, **metadata, "class_names": names}
    changed["model"] = metadata["model"] | {"num_classes": len(names)}
    path = tmp_path / "w"
    path.write_bytes(with_metadata(content, {"lab": json.dumps(changed)}))
    with Largest() as largest, pytest.raises(UserError) as raised:
        weights.load_model(path, weights.read_metadata(path))
    assert str(raised.value) == (
        f"{path} holds the weights of another architecture: classifier.2.bias has shape [10], "
        "not [300000]. Give the weights of the model that its metadata name."
    )
    assert largest.num_bytes < path.stat().st_size


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"classifier.2.bias": None}, "classifier.2.bias is missing"),
        ({"stranger": torch.zeros(1)}, "unexpected stranger"),
        ({"classifier.2.bias": torch.zeros(5)}, "classifier.2.bias has shape [5], not [10]"),
    ],
)
def test_p7_weights_of_another_architecture(fails, tmp_path, trained, tensors, reason):
    model = build_model(**trained[0]["model"])
    state = {k: v for k, v in {**model.state_dict(), **tensors}.items() if v is not None}
    model.state_dict = lambda: state
    weights.write_weights(tmp_path / "w", weights.copy_of(model), trained[0])
    assert fails(evaluate, "w") == (
        f"w holds the weights of another architecture: {reason}. "
        "Give the weights of the model that its metadata name."
    )


def test_p7_no_report_is_printed_or_left_if_predictions_cannot_be_written(
    fails, tmp_path, trained, monkeypatch
):
    def refuse(run, rows, probabilities):
        raise UserError("the disk is full", "Free some")

    (tmp_path / "w").write_bytes(trained[1])
    monkeypatch.setattr(RunDir, "write_predictions", refuse)
    assert fails(evaluate, "w", "--quiet", leaves=("evaluate-test",)) == (
        "the disk is full. Free some."
    )
    assert list((tmp_path / "evaluate-test").iterdir()) == []


def test_a_subset_of_a_split_has_a_directory_of_its_own():
    trained = {"max_train_samples": 320, "max_eval_samples": 100}
    parts = {("test", None): "test", ("test", 100): "test", ("test", 50): "test-50",
             ("test", 0): "test-all", ("train", 100): "train-100", ("train", 320): "train",
             ("all", 0): "all", ("all", 100): "all-100"}  # fmt: skip
    for (split, limit), name in parts.items():
        config = EvalConfig(weights=("w",), split=split, max_eval_samples=limit)
        assert config.part(trained) == name
