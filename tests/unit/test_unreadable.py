"""Images that cannot be decoded: all named at once, or left out by --skip-unreadable."""

import math
import os
from dataclasses import replace

import pytest
import torch
from mistakes import make_picture, matches

import evaluate
import train
from lab.checkpoint import weights
from lab.data import DataConfig, cache, decode
from lab.data import images as images_module
from lab.data.splits import load_split, load_splits
from lab.errors import UserError

CONFIG = DataConfig("", "data", 32, 0.25, 0.25, 0, 0, 0)
KINDS = pytest.mark.parametrize("memory", [math.inf, 0], ids=["resident", "streaming"])


@pytest.fixture
def images(tmp_path):
    """Return the paths of 24 images of each of two classes, and the settings that read them."""
    paths = [
        make_picture(tmp_path / f"images/{label}/{i:02}.png") for label in "ab" for i in range(24)
    ]
    return paths, replace(CONFIG, dataset=str(tmp_path / "images"))


def damage(splits, name: str, *positions: int) -> list[str]:
    """Damage files of a split; return their paths relative to the data directory."""
    split = getattr(splits, name)
    for i in positions:
        with open(split.paths[i], "wb") as file:
            file.write(f"not an image {name} {i}".encode())  # no duplicates of each other
    return [split.files()[i] for i in positions]


@pytest.mark.parametrize("augment", [(), ("resized-crop",)])  # with it, training images are lazy
@pytest.mark.parametrize("workers", [1, 2])
def test_one_error_names_all_of_every_split(images, workers, augment):
    _, config = images
    splits = load_splits(config, math.inf, 1)
    damaged = (
        damage(splits, "train", 0, 5) + damage(splits, "val", 2) + damage(splits, "test", 1, 3)
    )
    with pytest.raises(UserError) as caught:
        load_splits(config, math.inf, workers, augment=augment)
    assert caught.value.what.startswith("cannot read 5 images: ")
    assert all(f"{config.dataset}/{name}" in caught.value.what for name in damaged)
    assert caught.value.hint == "Replace or delete these files, or give --skip-unreadable"


def test_streamed_training_images_are_named_at_the_start(images, monkeypatch):
    """A sample of them is decoded for mean and std; if that fails, all images are checked."""
    _, config = images
    splits = load_splits(config, 0, 1)
    damaged = damage(splits, "train", 0, 5, 6)
    assert_all_are_named(config, damaged)
    monkeypatch.setattr(images_module, "SAMPLE_SIZE", 2)  # the first one of them is in the sample
    assert_all_are_named(config, damaged + damage(splits, "val", 1) + damage(splits, "test", 0))


def assert_all_are_named(config, damaged):
    with pytest.raises(UserError) as caught:
        load_splits(config, 0, 2)
    assert caught.value.what.startswith(f"cannot read {len(damaged)} images: ")
    assert all(f"{config.dataset}/{name}" in caught.value.what for name in damaged)


@KINDS
def test_skipped_images_are_left_out_of_their_splits_and_listed(
    images, monkeypatch, capsys, memory
):
    """The other samples stay in their split, in the same order."""
    _, config = images
    whole = load_splits(config, memory, 1)
    damaged = damage(whole, "train", 0, 7) + damage(whole, "val", 1) + damage(whole, "test", 0)
    config = replace(config, skip_unreadable=True)
    capsys.readouterr()
    left = load_splits(config, memory, 1)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: left out 4 images that cannot be read: ")
    assert all(f"{config.dataset}/{name}" in warning for name in damaged)
    for name in ("train", "val", "test"):
        before, after = getattr(whole, name), getattr(left, name)
        kept = [i for i, file in enumerate(before.files()) if file not in damaged]
        assert after.files() == [before.files()[i] for i in kept]
        assert torch.equal(after.labels, before.labels[kept])
        everything = torch.arange(len(kept))
        assert torch.equal(after.images[everything], before.images[torch.tensor(kept)])
        alone, fingerprint = load_split(config, name, memory, 1)
        assert alone.files() == after.files()
        assert fingerprint == left.fingerprints[name] != whole.fingerprints[name]
    assert len(load_split(config, "all", memory, 1)[0].labels) == 44
    # The list is cached: the next process decodes nothing.
    monkeypatch.setattr(decode, "decode", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(cache, "MIN_IMAGES", 10**9)
    assert left.test.files() == load_split(config, "test", 0, 1)[0].files()


def test_a_named_pipe_and_a_link_to_nothing_are_skipped_without_waiting(images):
    paths, config = images
    paths[3].unlink()
    os.mkfifo(paths[3])
    paths[4].unlink()
    paths[4].symlink_to("nowhere")
    config = replace(config, skip_unreadable=True)
    splits = load_splits(config, 0, 1)
    files = [file for name in ("train", "val", "test") for file in getattr(splits, name).files()]
    assert len(files) == 46
    folds = [load_splits(replace(config, folds=2, fold=i), 0, 1) for i in (1, 2)]
    assert len({fold.fingerprints["folds"] for fold in folds}) == 1
    with pytest.raises(UserError, match="cannot read 2 images"):
        load_splits(replace(config, skip_unreadable=False), math.inf, 1)


def test_a_class_without_readable_training_images_is_an_error(images):
    paths, config = images
    for path in paths[:24]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the training images of a can be read"):
        load_splits(replace(config, skip_unreadable=True), math.inf, 1)


def test_weights_say_what_their_evaluation_skips(images, tmp_path, monkeypatch, fails, capfd):
    """Images of another dataset are skipped only with the option."""
    _, config = images
    splits = load_splits(config, math.inf, 1)
    [damaged] = damage(splits, "test", 2)
    words = "--model lenet5 --dataset images --recipe smoke --quiet --threads 1 --epochs 1"
    words += " --val-fraction 0.25 --test-fraction 0.25 --skip-unreadable --name x"
    assert train.main(words.split()).exit_code == 0
    assert len((tmp_path / "runs/x/predictions.csv").read_text().splitlines()) == 12
    capfd.readouterr()
    evaluate.main(["runs/x", "--quiet", "--threads", "1"])
    assert f"left out 1 image that cannot be read: images/{damaged}" in capfd.readouterr().err
    eval_model = tmp_path / "runs/x/evaluate-test/predictions.csv"
    assert eval_model.read_bytes() == (tmp_path / "runs/x/predictions.csv").read_bytes()
    evaluate.main(["runs/x", "--quiet", "--threads", "1", "--dataset", "images", "--split", "all"])
    (tmp_path / "images").rename(tmp_path / "others")
    capfd.readouterr()
    other = ("runs/x", "--quiet", "--threads", 1, "--dataset", "others", "--split", "all")
    assert matches(
        fails(evaluate, *other),
        f"cannot read the image others/{damaged} (*). "
        "Replace or delete the file, or give --skip-unreadable.",
    )
    evaluate.main([*map(str, other), "--skip-unreadable"])
    assert "has changed" not in capfd.readouterr().err
    metadata = weights.read_metadata(tmp_path / "runs/x/best.safetensors")
    del metadata["data"]["skip_unreadable"]  # as in weights of an earlier version
    weights._check_metadata(metadata)
    assert not DataConfig(**metadata["data"]).skip_unreadable
