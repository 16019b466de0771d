"""Hugging Face datasets: the same batches as from a directory, columns, splits, and every error."""

import csv
import json
import pickle
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mistakes import make_picture, matches

import check_data
import evaluate
import train
from lab.checkpoint.weights import read_metadata
from lab.data import DataConfig, check_dataset, hugging_face
from lab.data.decode import FileImages
from lab.data.hugging_face import RowImages
from lab.data.image_folder import SUFFIXES, read_folder
from lab.data.loaders import LoaderOptions, build_loader
from lab.data.splits import load_split, load_splits, read_dataset
from lab.data.transforms import BatchTransform
from lab.errors import UserError

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")
NAMES = ("cat", "dog", "owl")
COUNTS = {"train": 7, "validation": 2, "test": 2}  # images of each class
SIZE = 16
SMALL = ["--model", "lenet5", "--recipe", "smoke", "--epochs", "1", "--batch-size", "8",
         "--threads", "1", "--workers", "0", "--quiet"]  # fmt: skip
COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Keep datasets out of the user's cache, and let every use of the network fail."""

    def no_network(*_, **__):
        raise AssertionError("the network is used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("socket.getaddrinfo", no_network)
        yield


def rows_of(root, split):
    """Return the rows of the images of a split of a directory, in lab's order."""
    part = getattr(read_folder(config(root)), "val" if split == "validation" else split)
    contents = [Path(path).read_bytes() for path in part.images.paths]
    names = [Path(path).name for path in part.images.paths]
    images = [{"bytes": b, "path": n} for b, n in zip(contents, names, strict=True)]
    return {"image": images, "label": part.labels.tolist()}


def to_dataset(rows, **features):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[*NAMES])} | features
    features = {name: features[name] for name in rows}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return the path of the same images as a directory, as Parquet files and as Arrow files."""
    root = tmp_path_factory.mktemp("sources")
    suffixes = (".jpg", ".png", ".bmp")
    for split, count in COUNTS.items():
        for name in NAMES:
            for i in range(count):
                file = f"{split}-{name}-{i}{suffixes[i % 3]}"
                make_picture(root / "folder" / split / name / file)
    loaded = datasets.DatasetDict(
        {split: to_dataset(rows_of(root / "folder", split)) for split in COUNTS}
    )
    (root / "parquet").mkdir()
    for i in range(5):
        shard = loaded["train"].shard(5, i, contiguous=True)
        shard.to_parquet(root / "parquet" / f"train-{i:05}-of-00005.parquet")
    for split in ("validation", "test"):
        loaded[split].to_parquet(root / "parquet" / f"{split}-00000-of-00001.parquet")
    loaded.save_to_disk(str(root / "arrow"))
    return root


def config(root, size=SIZE, **changes):
    return DataConfig(str(root), "data", size, 0.1, 0.2, 0, 0, 0, **changes)


def hub(root, **changes):
    return config(f"hf:{root}", **changes)


def write(path, rows, **features):
    """Write rows as the Parquet file of a training split."""
    path.mkdir(exist_ok=True)
    to_dataset(rows, **features).to_parquet(path / "train.parquet")
    return path


# The same images as in files


def batches(splits, rank, world_size, kind, workers, first):
    options = LoaderOptions(rank, world_size, torch.device("cpu"), kind, workers, 0.0)
    transform = BatchTransform(splits.mean, splits.std, ("crop", "flip"), options.device)
    loader = build_loader(splits.train, transform, options, batch_size=5, seed=3)
    with closing(loader):
        return list(loader.batches(2, first))


@pytest.mark.parametrize("source", ["parquet", "arrow", "folder"])
@pytest.mark.parametrize("workers", [None, 0, 2])
def test_p2_batches_equal_those_of_files(sources, source, workers):
    """In order, to the bit, on 1, 2 and 3 processes and from mid-epoch; from any loader."""
    kind, memory = ("resident", 1e9) if workers is None else ("streaming", 0)
    augment = () if workers is None else ("resized-crop", "trivialaugment")
    expected = load_splits(config(sources / "folder"), memory, 1, augment=augment)
    found = load_splits(hub(sources / source), memory, 1, augment=augment)
    assert found.train.class_names == expected.train.class_names == NAMES
    assert (found.mean, found.std) == (expected.mean, expected.std)
    for name in ("val", "test"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        index = torch.arange(len(theirs.labels))
        assert torch.equal(ours.images[index], theirs.images[index])
        assert torch.equal(ours.labels, theirs.labels)
    configs = (config(sources / "folder"), hub(sources / source))
    every = [load_split(c, "all", 0, 1)[0].images for c in configs]
    index = torch.tensor([32, 27, 24, 21, 20, 0])
    assert torch.equal(every[0][index], every[1][index])
    worlds = [(0, 1, 0), (0, 2, 0), (1, 2, 2), (2, 3, 0), (1, 3, 3)]
    for rank, world_size, first in worlds if workers != 2 else worlds[2:3]:
        of_files = batches(expected, rank, world_size, kind, workers or 0, first)
        of_rows = batches(found, rank, world_size, kind, workers or 0, first)
        assert len(of_rows) == len(of_files) == 5 - first
        for ours, theirs in zip(of_rows, of_files, strict=True):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.indices, theirs.indices)


def test_held_out_splits_and_duplicates_equal_those_of_files(sources, tmp_path):
    """Rows with the same content stay together; a name that several rows have is not used."""
    folder = tmp_path / "folder"
    shutil.copytree(sources / "folder" / "train", folder)
    for name in NAMES:
        for i in (1, 2, 3):
            shutil.copy(folder / name / f"train-{name}-0.jpg", folder / name / f"copy-{i}.jpg")
    rows = rows_of(folder, "train")
    for row in rows["image"]:
        row["path"] = "image.jpg"
    path = write(tmp_path / "rows", rows)
    expected, found = load_splits(config(folder), 0, 1), load_splits(hub(path), 0, 1)
    for name in ("train", "val", "test"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert torch.equal(ours.labels, theirs.labels)
        index = torch.arange(len(theirs.labels))
        assert torch.equal(ours.images[index], theirs.images[index])
    assert set(found.train.files()) < {f"train/{i}" for i in range(len(rows["label"]))}


def test_decoded_images_are_cached_until_the_rows_change(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    path = shutil.copytree(sources / "parquet", tmp_path / "rows")
    images = read_dataset(hub(path)).train.images
    decoded = images.decode_all(0, use_cache=True)
    assert torch.equal(decoded, images[torch.arange(len(images))])
    with monkeypatch.context() as patch:
        patch.setattr(RowImages, "decode", None)
        assert torch.equal(images.decode_all(0, use_cache=True), decoded)
    part = images.select(torch.arange(9).flip(0))
    assert torch.equal(part.decode_all(0, use_cache=True), decoded[:9].flip(0))
    write(path, rows_of(sources / "folder", "test"))
    for shard in path.glob("train-*"):
        shard.unlink()
    assert len(read_dataset(hub(path)).train.images.decode_all(0, use_cache=True)) == 6


def test_workers_open_the_tables_again(sources):
    """Where workers are not forked, images are pickled; their content is not copied."""
    images = read_dataset(hub(sources / "parquet")).train.images
    assert len(content := pickle.dumps(images)) < len(images.read(2)) * 5
    assert pickle.loads(content).read(2) == images.read(2)


def test_fingerprints_hold_labels_names_and_contents(sources, tmp_path):
    rows = rows_of(sources / "folder", "train")

    def fingerprint(name, change=lambda _: None):
        changed = json.loads(json.dumps(rows["label"]))
        images = [dict(image) for image in rows["image"]]
        change((images, changed))
        path = write(tmp_path / name, {"image": images, "label": changed})
        return load_split(hub(path), "train", 0, 1)[1]

    def replace_pixel(content):
        images, _ = content
        images[1]["bytes"] = images[1]["bytes"][:-2] + b"12"

    def rename(content):
        content[0][1]["path"] = "other.png"

    def swap(content):
        content[1][0], content[1][-1] = content[1][-1], content[1][0]

    first = fingerprint("first")
    assert fingerprint("moved") == first
    changed = [fingerprint(f"{i}", f) for i, f in enumerate((replace_pixel, rename, swap))]
    assert len({first, *changed}) == 4


def test_rows_of_a_directory_are_files(sources):
    part = read_dataset(hub(sources / "folder")).test
    assert type(part.images) is FileImages
    assert part.files() == [f"test/{n}/test-{n}-{i}.{s}" for n in NAMES
                            for i, s in enumerate(("jpg", "png"))]  # fmt: skip
    assert all(file.endswith(SUFFIXES) for file in part.files())


# Columns, labels and splits


def test_columns_are_found_by_type_or_name_or_given(sources, tmp_path):
    rows = rows_of(sources / "folder", "train")
    words = [NAMES[2 - label] for label in rows["label"]]  # not in sorted order
    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    string, binary, number = map(datasets.Value, ("string", "binary", "int64"))
    cases = [
        ({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=[*NAMES])}, {}, NAMES),
        ({"img": plain, "labels": string}, {}, NAMES),
        ({"image": binary, "label": number}, {}, ("0", "1", "2")),
        (
            {"image": datasets.Image(), "x": datasets.ClassLabel(names=["none", *NAMES])},
            {"image_column": "image", "label_column": "x"},
            NAMES[:2],
        ),
    ]
    for number, (features, given, names) in enumerate(cases):
        image, label = features
        images = [row["bytes"] for row in rows["image"]] if number == 2 else rows["image"]
        labels = words if number == 1 else [i + (number == 3) for i in rows["label"]]
        if number == 3:  # classes without images are left out
            labels = [min(i, 2) for i in labels]
        path = write(tmp_path / str(number), {image: images, label: labels}, **features)
        found = read_dataset(hub(path, **given)).train
        assert found.class_names == names
        index = torch.arange(len(labels))
        expected = read_folder(config(sources / "folder")).train
        assert torch.equal(found.images[index], expected.images[index])
        expected_labels = 2 - expected.labels if number == 1 else expected.labels
        assert torch.equal(found.labels, expected_labels.clamp(max=len(names) - 1))


def test_splits_without_labels_and_other_splits_are_ignored(sources, tmp_path):
    loaded = datasets.load_from_disk(str(sources / "arrow"))
    rows = rows_of(sources / "folder", "test")
    unlabeled = to_dataset({"image": rows["image"], "label": [-1] * 6})
    splits = {"train": loaded["train"], "test": unlabeled, "extra": loaded["test"]}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    raw = read_dataset(hub(tmp_path / "saved"))
    assert (raw.val, raw.test) == (None, None)
    path = f"hf:{tmp_path / 'saved'}"
    assert raw.warnings == (
        f"ignored the split extra of {path}",
        f"ignored the test split of {path}, which has no labels",
    )
    loaded["train"].save_to_disk(str(tmp_path / "single"))
    assert len(read_dataset(hub(tmp_path / "single")).train.labels) == 21


# Training and evaluation


def test_a_run_records_how_its_data_were_read(sources, tmp_path, capfd):
    rows = rows_of(sources / "folder", "train")
    rows = {"image": rows["image"], "a": rows["label"], "b": rows["label"]}
    rows["image"][3]["bytes"] = b"damaged"
    kinds = {name: datasets.ClassLabel(names=[*NAMES]) for name in "ab"}
    path = f"hf:{write(tmp_path / 'rows', rows, **kinds)}"
    words = ["--dataset", path, "--label-column", "b", "--skip-unreadable", "--name", "run"]
    run = train.main([*words, *SMALL, "--output-dir", str(tmp_path)])
    data = read_metadata(run.best)["data"]
    assert (data["dataset"], data["label_column"], data["revision"]) == (path, "b", "")
    with open(run.path / "predictions.csv") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    assert set(names) < {row["path"] for row in rows["image"]}
    assert "left out 1 image that cannot be read: train-cat-3.jpg" in capfd.readouterr().err
    page = ["--output", str(tmp_path / "page.html")]
    assert check_data.main([path, "--label-column", "b", *page]) == 1
    assert "problem: cannot read the image train-cat-3.jpg" in capfd.readouterr().out
    evaluate.main([str(run.path), "--quiet", "--threads", "1"])
    first, again = (
        json.loads((run.path / name).read_text())
        for name in ("report.json", "evaluate-test/report.json")
    )
    assert again["confusion_matrix"] == first["confusion_matrix"]
    assert "has changed" not in capfd.readouterr().err
    train.main(["--resume", str(run.path), "--epochs", "2", "--quiet"])


class Builder:
    """Stands for the library's builder of a dataset of the Hub."""

    name = "parquet"

    def __init__(self, loaded, commit):
        self.loaded, self.hash = loaded, commit

    def download_and_prepare(self):
        pass

    def as_dataset(self):
        return self.loaded


def test_the_commit_of_a_dataset_of_the_hub_is_recorded_and_kept(sources, tmp_path, monkeypatch):
    asked = []

    def load_dataset_builder(name, subset, revision):
        asked.append((name, subset, revision, datasets.config.HF_HUB_OFFLINE))
        return Builder(datasets.load_from_disk(str(sources / "arrow")), COMMIT)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    words = ["--dataset", "hf:me/pets:small", "--revision", "v1", "--name", "run"]
    run = train.main([*words, *SMALL, "--output-dir", str(tmp_path)])
    evaluate.main([str(run.path), "--quiet"])
    evaluate.main([str(run.path), "--dataset", "hf:me/pets:small", "--quiet"])
    evaluate.main([str(run.path), "--dataset", "hf:me/other", "--quiet"])
    evaluate.main([str(run.path), "--revision", "v2", "--quiet"])
    train.main(["--resume", str(run.path), "--epochs", "2", "--quiet"])
    train.main(["--resume", str(run.path), "--epochs", "3", "--quiet", *words[:4]])
    again = ["--config", str(run.path / "config.json"), "--name", "2", "--quiet"]
    train.main([*again, "--output-dir", str(tmp_path)])
    assert asked == [
        ("me/pets", "small", "v1", False),
        ("me/pets", "small", COMMIT, True),  # P4: weights of a stranger download nothing
        ("me/pets", "small", COMMIT, False),
        ("me/other", None, None, False),
        ("me/pets", "small", "v2", True),
        ("me/pets", "small", COMMIT, True),
        ("me/pets", "small", COMMIT, False),
        ("me/pets", "small", COMMIT, False),
    ]
    assert read_metadata(run.best)["data"]["revision"] == COMMIT
    card = (run.path / "README.md").read_text()
    assert "datasets:\n- me/pets\n" in card
    assert "python train.py --config config.json\n" in card
    with pytest.raises(UserError, match=r"--revision f{40} differs from the run's"):
        train.main(["--resume", str(run.path), "--revision", "f" * 40, "--quiet"])


def test_p1_names_in_two_unicode_forms_are_one_class(sources, tmp_path):
    """As in a directory: e with an accent is one character, or two."""
    rows, text = rows_of(sources / "folder", "train"), datasets.Value("string")
    names = ["caf\u00e9", "cafe\u0301", "tea"]
    spelled = rows | {"label": [names[label] for label in rows["label"]]}
    raw = read_dataset(hub(write(tmp_path / "text", spelled, label=text)))
    assert raw.train.class_names == ("caf\u00e9", "tea")
    assert raw.train.labels.tolist() == [int(label == 2) for label in rows["label"]]
    path = write(tmp_path / "labels", rows, label=datasets.ClassLabel(names=names))
    with pytest.raises(UserError, match="has several classes named caf\u00e9"):
        read_dataset(hub(path))


@pytest.mark.parametrize("files", ["train", "test"])
def test_rows_of_one_split_may_be_files_and_those_of_another_bytes(sources, tmp_path, files):
    splits = {split: rows_of(sources / "folder", split) for split in ("train", "test")}
    for i, image in enumerate(splits[files]["image"]):
        path = tmp_path / f"{i}-{image['path']}"
        path.write_bytes(image["bytes"])
        splits[files]["image"][i] = {"bytes": None, "path": str(path)}
    (tmp_path / "rows").mkdir()
    for split, rows in splits.items():
        pq.write_table(to_dataset(rows).data.table, tmp_path / "rows" / f"{split}.parquet")
    found = load_splits(hub(tmp_path / "rows"), 1e9, 1)
    expected = load_splits(config(sources / "folder"), 1e9, 1)
    assert torch.equal(found.test.images, expected.test.images)
    raw = read_dataset(hub(tmp_path / "rows"))
    part = getattr(raw, files).images
    before = part.key("")
    Path(splits[files]["image"][0]["path"]).write_bytes(b"changed")
    assert getattr(read_dataset(hub(tmp_path / "rows")), files).images.key("") != before
    Path(splits[files]["image"][0]["path"]).write_bytes(
        rows_of(sources / "folder", files)["image"][0]["bytes"]
    )
    assert len(raw.train.images.join([raw.test.images]).decode_all(0)) == sum(
        len(rows["label"]) for rows in splits.values()
    )


# Errors


def test_p7_paths_that_cannot_be_files(tmp_path):
    paths = [path for i in range(9) for path in (str(tmp_path / f"{i}.png"), f"{i}", f"\0{i}")]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [0, 1, 2] * 9}
    (tmp_path / "rows").mkdir()  # `to_parquet` would read the files
    pq.write_table(to_dataset(rows).data.table, tmp_path / "rows" / "train.parquet")
    with pytest.raises(UserError, match="cannot read 27 images"):
        load_splits(replace(hub(tmp_path / "rows"), val_fraction=0), 1e9, 1)


def test_p7_what_is_no_dataset_of_images(sources, tmp_path):
    rows = rows_of(sources / "folder", "train")
    two = datasets.ClassLabel(names=[*NAMES])
    number, text = datasets.Value("float32"), datasets.Value("string")
    labels = {"a": rows["label"], "b": rows["label"]}
    words = ["word"] * 21
    other = [min(label, 1) for label in rows["label"]]
    cases = [
        ({"image": rows["image"], **labels}, {"a": two, "b": two}, {},
         "the dataset has 2 label columns; its columns are image, a, b. Give --label-column."),
        ({"label": rows["label"]}, {}, {},
         "the dataset has no column of images; its columns are label. Give --image-column."),
        (rows, {}, {"image_column": "img"},
         "the dataset has no column img; its columns are image, label. Correct --image-column."),
        ({**rows, "text": words}, {"text": text}, {"image_column": "text"},
         "the column text of PATH contains no images, but string. Give --image-column one of "
         "image, label, text."),
        ({**rows, "size": [0.5] * 21}, {"size": number}, {"label_column": "size"},
         "the column size of PATH contains no labels, but float32. Give --label-column one of "
         "image, label, size."),
        ({**rows, "label": [-1, *rows["label"][1:]]}, {}, {},
         "1 rows of the train split of PATH have no label. Delete them, or give another "
         "--label-column."),
        ({**rows, "label": [0] * 21}, {}, {},
         "PATH has only one class, cat. Add images of the other classes."),
    ]  # fmt: skip
    for number, (content, features, given, expected) in enumerate(cases):
        path = write(tmp_path / str(number), content, **features)
        with pytest.raises(UserError) as error:
            load_splits(hub(path, **given), 0, 1)
        assert str(error.value).replace(f"hf:{path}", "PATH") == expected
    saved = {"train": to_dataset({**rows, "label": other}), "test": to_dataset(rows)}
    saved = {name: part.cast_column("label", text) for name, part in saved.items()}
    for names, expected in (
        (("train", "test"), "PATH has classes that its training split lacks: 2. Every split needs "
         "images of the same classes."),
        (("test",), "PATH has no training split (its splits: test). Rename the split to train on "
         "to train."),
    ):  # fmt: skip
        path = tmp_path / names[0]
        datasets.DatasetDict({name: saved[name] for name in names}).save_to_disk(str(path))
        with pytest.raises(UserError) as error:
            load_splits(hub(path), 0, 1)
        assert str(error.value).replace(f"hf:{path}", "PATH") == expected


def test_p7_damaged_rows_are_named(sources, tmp_path):
    rows = rows_of(sources / "folder", "train")
    rows["image"][0]["bytes"], rows["image"][9] = b"damaged", None
    path = write(tmp_path / "rows", rows)
    with pytest.raises(UserError, match="cannot read 2 images: train/9, train/0"):
        load_splits(replace(hub(path), val_fraction=0), 1e9, 1)


def test_p7_what_cannot_be_loaded(fails, sources, tmp_path, monkeypatch):
    def message(dataset, *words):
        return fails(train, "--dataset", dataset, *words, *SMALL)

    parquet = f"hf:{sources / 'parquet'}"
    assert message("hf:a/b/c") == "there is no file or directory a/b/c. Check the path."
    assert message(parquet, "--revision", "v1") == (
        f"--revision is for a dataset on the Hub, not for {sources / 'parquet'}, which is a path. "
        "Leave it out."
    )
    assert message("digits", "--revision", "v1") == (
        "--revision is for a Hugging Face dataset, not for digits. Leave it out, or give --dataset "
        "hf:NAME."
    )
    (tmp_path / "empty").mkdir()
    assert matches(
        message(f"hf:{tmp_path / 'empty'}"),
        f"cannot load the dataset {tmp_path / 'empty'} (*). Give a directory or file of Parquet, a "
        "directory of save_to_disk, or an imagefolder.",
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        expected = "the dataset me/pets is not cached, and could not be downloaded (*). Check the "
        expected += "name and the network; "
        assert matches(message("hf:me/pets"), f"{expected}no dataset is cached.")
        (cache / "me___birds" / "default" / "0.0.0" / COMMIT).mkdir(parents=True)
        assert matches(message("hf:me/pets"), f"{expected}cached: me/birds.")
    with pytest.raises(UserError, match="only a dataset that you name yourself is downloaded"):
        read_dataset(hub("me/pets"), download=False)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert message("hf:me/pets") == (
        "hf:me/pets needs the package datasets. Run pip install -e '.[hf]' in lab's checkout."
    )


def test_names_without_a_separator_are_checked_later():
    for name in ("hf:beans", "hf:saved"):
        check_dataset(name, {"dataset": name})


def test_p7_another_commit_in_the_cache_is_not_taken():
    builder = Builder({}, COMMIT)
    hugging_face._check_revision(builder, "me/pets", "v1")
    builder.name = "cache"
    hugging_face._check_revision(builder, "me/pets", COMMIT[:7])
    hugging_face._check_revision(builder, "me/pets", "")
    with pytest.raises(UserError, match=f"revision v1 of me/pets is not .*, {COMMIT}"):
        hugging_face._check_revision(builder, "me/pets", "v1")
