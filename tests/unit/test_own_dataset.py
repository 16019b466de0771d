"""Datasets that are code of the user's: --dataset FILE.py:FUNCTION, and train.main(datasets=)."""

import hashlib
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import make_picture
from PIL import Image

import evaluate
import export
import predict
import train
from lab import own_code
from lab.checkpoint.weights import read_metadata
from lab.data import DataConfig
from lab.data.decode import decode
from lab.data.image_folder import read_folder
from lab.data.splits import load_split, load_splits, read_dataset
from lab.errors import UserError, run_script

SIZE = 16
SMALL = ["--model", "lenet5", "--recipe", "smoke", "--epochs", "1", "--batch-size", "8",
         "--threads", "1", "--workers", "0", "--quiet", "--name", "run"]  # fmt: skip
# A file that leaves a mark beside it whenever it is imported.
FILE = """
    from pathlib import Path

    import numpy as np

    Path(__file__).with_suffix(".imported").touch()

    def digits():
        random = np.random.RandomState(0)
        images = random.randint(0, 256, (60, 16, 16, 3), dtype=np.uint8)
        return {"train": (images, np.arange(60) % 3), "class_names": ["a", "b", "c"]}
"""


class Samples:
    """A map-style dataset, as people have them."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 7), ("val", 2), ("test", 2)):
        for name in "abc":
            for i in range(count):
                make_picture(root / split / name / f"{i}.png")
    return root


def config(dataset, **changes):
    return DataConfig(str(dataset), "data", SIZE, 0.1, 0.2, 0, 0, 0, **changes)


def write(path, text=FILE):
    path.write_text(textwrap.dedent(text))
    return path


def was_imported(path):
    mark = path.with_suffix(".imported")
    found = mark.exists()
    mark.unlink(missing_ok=True)
    return found


def given(datasets, **changes):
    return config(own_code.register(own_code.DATASETS, datasets), **changes)


# What a dataset may consist of


def forms(part):
    """Return the same split in every form, by name: (images, labels), or a dataset."""
    paths, labels = part.images.paths, part.labels
    pictures = [decode(path) for path in paths]
    as_arrays = [picture.permute(1, 2, 0).numpy() for picture in pictures]
    step = max(1, len(paths) // 16)  # only some of the labels are compared with the targets
    read = [n if i % step == 0 else -1 for i, n in enumerate(labels.tolist())]
    with_targets = Samples(list(zip(paths, read, strict=True)))
    with_targets.targets = labels.tolist()
    return {
        "arrays": (np.stack(as_arrays), labels.numpy()),
        "tensor": (torch.stack(pictures).permute(0, 2, 3, 1), labels.tolist()),
        "paths": ([Path(path) for path in paths], labels),
        "names": (list(paths), ["abc"[label] for label in labels]),
        "dataset of paths": Samples(list(zip(paths, labels.tolist(), strict=True))),
        "dataset of pictures": Samples(
            [(Image.open(path), n) for path, n in zip(paths, labels, strict=True)]
        ),
        "dataset of arrays": Samples(list(zip(as_arrays, labels.numpy(), strict=True))),
        "dataset of tensors": Samples(list(zip(pictures, labels.tolist(), strict=True))),
        "dataset with targets": with_targets,
    }


@pytest.mark.parametrize("lazy", [False, True])
def test_every_form_gives_the_images_of_the_directory(folder, lazy):
    raw, augment = read_folder(config(folder)), ("trivialaugment",) if lazy else ()
    names = {"train": "train", "validation": "val", "test": "test"}
    parts = {name: forms(getattr(raw, split)) for name, split in names.items()}
    expected = load_splits(config(folder), 0 if lazy else 1e9, 1, augment=augment)
    index = torch.tensor([[5, 7], [0, 9]])
    for form in parts["train"]:
        datasets = {name: parts[name][form] for name in parts} | {"class_names": [*"abc"]}
        found = load_splits(given(datasets), 0 if lazy else 1e9, 1, augment=augment)
        assert found.train.class_names == ("a", "b", "c")
        for split in ("train", "val", "test"):
            ours, theirs = getattr(found, split), getattr(expected, split)
            assert torch.equal(ours.labels, theirs.labels), form
            positions = torch.arange(len(theirs.labels))
            assert torch.equal(ours.images[positions], theirs.images[positions]), form
        if lazy:
            assert torch.equal(found.train.images[index], expected.train.images[index]), form
        assert (found.train.files() == expected.train.files()) == (form in ("paths", "names"))


def test_splits_are_held_out_and_joined_and_gray_images_stay_gray(folder):
    gray = np.random.RandomState(0).randint(0, 256, (30, SIZE, SIZE), dtype=np.uint8)
    lazy = Samples([(image, i % 3) for i, image in enumerate(gray)])
    in_memory, from_dataset = (
        load_splits(given({"train": train_split}), 0, 1)
        for train_split in ((gray, np.arange(30) % 3), lazy)
    )
    assert from_dataset.train.class_names == ("0", "1", "2")
    for name in ("train", "val", "test"):
        ours, theirs = getattr(from_dataset, name), getattr(in_memory, name)
        index = torch.arange(len(theirs.labels))
        assert ours.images.shape == (len(index), 1, SIZE, SIZE)
        assert torch.equal(ours.images[index], theirs.images[index])
        assert from_dataset.fingerprints[name] == in_memory.fingerprints[name]
    splits = {"train": lazy, "test": Samples(lazy.samples[:4])}
    images = load_split(given(splits), "all", 0, 1)[0].images
    assert torch.equal(images[torch.tensor([33, 0])][:, 0], torch.from_numpy(gray[[3, 0]]))


def test_a_torch_dataset_is_read_by_workers(folder):
    part = forms(read_folder(config(folder)).train)["dataset of paths"]
    images = read_dataset(given({"train": part})).train.images
    assert torch.equal(images.decode_all(2), images.decode_all(0))


# Runs


def test_p4_only_the_command_line_makes_a_file_be_imported(fails, tmp_path):
    """Not weights, a run or a settings file; a file that has changed is not imported either."""
    path = write(tmp_path / "mine.py")
    name = f"{path}:digits"
    train.main(["--dataset", name, *SMALL, "--output-dir", str(tmp_path)])
    assert was_imported(path)
    run = tmp_path / "run"
    data = read_metadata(run / "best.safetensors")["data"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (data["dataset"], data["revision"]) == (name, sha256)

    own = f"the dataset is {name}, code that runs only if you name it yourself. If you trust that "
    own += f"file, give --dataset {name}."
    assert fails(evaluate, run, "--quiet") == own
    assert fails(train, "--resume", run, "--quiet", "--epochs", "2") == own
    settings = run / "config.json"
    assert fails(train, "--config", settings, "--quiet", "--name", "other") == (
        f"the dataset in {settings} is {name}, code that runs only if you name it yourself. If you "
        f"trust that file, add --dataset {name}."
    )
    make_picture(tmp_path / "image.png")
    predict.main([str(run), str(tmp_path / "image.png"), "--quiet"])
    export.main([str(run), "--output", str(tmp_path / "model.onnx")])
    assert not was_imported(path)

    # The file may be moved, but must be the same.
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.move(path, tmp_path / "moved"))
    name = f"{moved}:digits"
    evaluate.main([str(run), "--dataset", name, "--quiet"])
    train.main(["--resume", str(run), "--dataset", name, "--quiet", "--epochs", "2"])
    train.main(["--config", str(settings), "--dataset", name, *SMALL[-3:-1], "again",
                "--output-dir", str(tmp_path)])  # fmt: skip
    assert was_imported(moved)
    moved.write_text(moved.read_text() + "# changed\n")
    changed = f"{moved} has changed since the training. Give the file as it was in training."
    assert fails(evaluate, run, "--dataset", name, "--quiet") == changed
    words = ("--dataset", name, "--quiet", "--epochs", "3")
    assert fails(train, "--resume", run, *words) == changed
    assert not was_imported(moved)
    train.main(["--config", str(settings), "--dataset", name, *SMALL[-3:-1], "changed",
                "--output-dir", str(tmp_path)])  # fmt: skip
    other = write(moved.with_name("other.py"))
    evaluate.main([str(run), "--dataset", f"{other}:digits", "--quiet"])
    assert was_imported(other)


def test_a_dataset_is_passed_to_train_main(tmp_path, fails, monkeypatch):
    images = np.random.RandomState(0).randint(0, 256, (60, SIZE, SIZE, 3), dtype=np.uint8)
    datasets = {"train": (images, np.arange(60) % 3)}
    run = train.main([*SMALL, "--output-dir", str(tmp_path)], datasets=datasets)
    evaluate.main([str(run.path), "--quiet"])
    resume = ["--resume", str(run.path), "--epochs", "2", "--quiet"]
    assert train.main(resume, datasets=datasets).is_finished
    monkeypatch.delitem(own_code.PASSED, own_code.DATASETS)
    assert fails(evaluate, run.path, "--quiet") == (
        "the dataset was passed to train.main. Pass it again, or give --dataset."
    )


# Errors

HINT = "docs/extending.md shows what a dataset of your own returns."
IMAGES = np.zeros((4, 8, 8, 3), np.uint8)
LABELS = [0, 1, 0, 1]
SAMPLES = [(image, label) for image, label in zip(IMAGES, LABELS, strict=True)]


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([], "list, not a dictionary of splits"),
        ({"test": (IMAGES, LABELS)}, "no split train"),
        ({"train": (IMAGES, LABELS), "eval": 0}, "the split 'eval', not train, val, test or "
         "class_names"),
        ({"train": 7}, "SPLIT int, not a pair (images, labels) or a map-style "
         "dataset"),
        ({"train": Samples([])}, "SPLIT no samples"),
        ({"train": (IMAGES / 255, LABELS)}, "SPLIT images float64 [4, 8, 8, 3], not uint8 "
         "[N, H, W] or [N, H, W, C] with 1 or 3 channels"),
        ({"train": (IMAGES.transpose(0, 3, 1, 2), LABELS)}, "SPLIT images uint8 [4, 3, 8, 8], "
         "not uint8 [N, H, W] or [N, H, W, C] with 1 or 3 channels"),
        ({"train": (7, LABELS)}, "SPLIT images of type int, not an array or paths"),
        ({"train": (IMAGES, LABELS[1:])}, "SPLIT 4 images, but labels (3,)"),
        ({"train": (IMAGES, [0.5] * 4)}, "labels of type float, not int or str"),
        ({"train": (IMAGES, LABELS), "class_names": ["a"]}, "labels from 0 to 1 for 1 classes"),
        ({"train": (IMAGES, LABELS), "class_names": [*"aba"]}, "class_names that contain a more "
         "than once"),
        ({"train": (IMAGES, [[0], [1, 2], [0], [1]])}, "SPLIT labels of different lengths"),
        ({"train": (IMAGES, np.eye(4, dtype=int))}, "labels of type list, not int or str"),
        ({"train": (IMAGES[:0], [])}, "SPLIT no samples"),
        ({"train": (IMAGES, [0, 1, 10**12, 1])}, "the label 1000000000000, but no class_names"),
        ({"train": (IMAGES, [*"abab"]), "class_names": [*"ac"]}, "labels that are not in "
         "class_names: b"),
        ({"train": (IMAGES, LABELS), "val": (IMAGES[..., 0], LABELS)}, "splits of different kinds "
         "of images, or numbers of channels"),
    ],
)  # fmt: skip
def test_p7_what_is_no_dataset(result, expected):
    with pytest.raises(UserError) as error:
        read_dataset(given(result))
    what, _, returned = expected.partition("SPLIT ")
    where = "datasets, split train," if returned else "datasets"
    assert str(error.value) == f"{where} returned {returned or what}. {HINT}"


def test_names_in_another_unicode_form_and_case_are_the_same():
    labels = ["cafe\u0301", "tea"] * 2  # e and an accent, in two characters
    raw = read_dataset(given({"Train": (IMAGES, labels), "class_names": ["caf\u00e9", "tea"]}))
    assert raw.train.class_names == ("caf\u00e9", "tea")
    assert raw.train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (IMAGES[0], "has ndarray at index 2, not a pair (image, label)"),
        ((torch.zeros(3, 8, 8), 0), "has as an image float32 [3, 8, 8], not a PIL image, a path, "),
        ((IMAGES[0, ..., 0], 0), "has as an image uint8 [1, 8, 8], not a PIL image, a path, or "
         "uint8 [C, H, W] or array [H, W, C] with 3 channels."),
        (("missing.png", 0), "cannot read the image missing.png"),
        ((IMAGES[0].astype(object), 0), "has as an image object [8, 8, 3], not a PIL image"),
        ((IMAGES[0], np.eye(2, dtype=int)[0]), "labels of type int, ndarray, not int or str"),
    ],
)  # fmt: skip
def test_p7_samples_that_are_no_images(sample, expected):
    samples = Samples([*SAMPLES[:2], sample, *SAMPLES[2:]])
    with pytest.raises(UserError) as error:
        load_splits(replace(given({"train": samples}), val_fraction=0), 1e9, 0)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "make", [np.int64, torch.tensor, lambda x: torch.tensor([x]), np.atleast_1d]
)
def test_labels_may_be_arrays_of_one_number(make):
    samples = Samples([(image, make(label)) for image, label in SAMPLES])
    splits = load_splits(replace(given({"train": samples}), val_fraction=0), 1e9, 0)
    assert sorted(splits.train.labels.tolist() + splits.test.labels.tolist()) == sorted(LABELS)


def test_arrays_in_bgr_order_may_be_reversed_views():
    samples = Samples([(image[..., ::-1], label) for image, label in SAMPLES])
    splits = load_splits(replace(given({"train": samples}), val_fraction=0), 1e9, 0)
    plain = load_splits(replace(given({"train": Samples(SAMPLES)}), val_fraction=0), 1e9, 0)
    assert torch.equal(splits.train.images, plain.train.images.flip(1))


def test_p7_files_that_fail(fails, tmp_path, capfd):
    def message(text, name="f"):
        path = write(tmp_path / "mine.py", text)
        return fails(train, "--dataset", f"{path}:{name}", *SMALL).replace(str(path), "FILE")

    def f(body):
        return f"def f():\n    {body}\n"

    assert fails(train, "--dataset", "no.py:f", *SMALL) == (
        "cannot read no.py (No such file or directory). Check the path."
    )
    assert message("x = 1", "f") == "FILE has no function f. Check its name."
    assert message("x = 1", "") == "FILE has no function. Check its name."
    shown = "Correct it; --debug shows the traceback."
    assert message("x = 1 / 0") == f"FILE raised ZeroDivisionError: division by zero. {shown}"
    assert message("x = ").startswith("FILE raised SyntaxError: ")
    assert message("import sys\nsys.exit()") == f"FILE raised SystemExit. {shown}"
    assert message(f("return {}[1]")) == f"FILE:f raised KeyError: 1. {shown}"
    assert message(f("return 1")) == f"FILE:f returned int, not a dictionary of splits. {HINT}"
    write(tmp_path / "mine.py", f("return {}[1]  # here"))
    words = ["--dataset", f"{tmp_path / 'mine.py'}:f", *SMALL, "--debug"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words])
        assert run_script(lambda: train.main(words).exit_code) == 2
    assert "return {}[1]  # here" in capfd.readouterr().err


def test_labels_that_a_subclass_changes_are_read_instead_of_the_targets_that_it_inherits():
    class Binary(Samples):
        classes, targets = ["x", "y", "z"], [0, 1, 2, 1]

        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image, int(label == 1)

    samples = Binary([(image, t) for image, t in zip(IMAGES, Binary.targets, strict=True)])
    raw = read_dataset(given({"train": samples, "class_names": ["other", "y"]}))
    assert raw.train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("names", [{"a": 0, "b": 1}, {"a", "b"}, "ab"])
def test_p7_class_names_need_an_order(names):
    message = f"datasets returned class_names of type {type(names).__name__}, not a list"
    with pytest.raises(UserError, match=message):
        read_dataset(given({"train": (IMAGES, LABELS), "class_names": names}))


def test_p7_a_class_name_that_no_file_can_contain():
    with pytest.raises(UserError, match=r"the class name '\\ud800', which is not UTF-8"):
        read_dataset(given({"train": (IMAGES, ["a", "\ud800"] * 2)}))
