"""Splits: how they are read, divided, limited and resized, and their statistics; P6."""

import gzip
import hashlib
import math
import os
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import sklearn.datasets
import torch
from mistakes import make_picture
from shapes import write_shapes
from torchvision import datasets
from torchvision.transforms import v2

import train
from lab.config.schema import TrainConfig
from lab.data import DATASETS, DataConfig, loaders
from lab.data.digits import load_digits
from lab.data.images import channel_statistics, in_memory, resize, sample_positions
from lab.data.splits import load_split, load_splits
from lab.data.stratification import random_choice, stratified_sample, stratified_split
from lab.data.transforms import EvalTransform
from lab.data.types import Split
from lab.errors import UserError


def config(dataset, **settings):
    settings = {"image_size": 8 if dataset == "digits" else 32} | settings
    return DataConfig.of(TrainConfig(dataset=dataset, **settings))


def load(dataset, **settings):
    return load_splits(config(dataset, **settings), math.inf, 1)


def make_labels(sizes, seed=0):
    """Return labels of `sizes[k]` samples of each class k, shuffled."""
    labels = make_labels_in_order(sizes)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def make_labels_in_order(sizes):
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def digest(*tensors):
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def labeled_images(split):
    """Return how often each labeled image occurs."""
    rows = zip(split.images.flatten(1).tolist(), split.labels.tolist(), strict=True)
    return Counter((bytes(image), label) for image, label in rows)


SIZES = ([10, 10, 10], [1, 2, 97], [7], [0, 5, 0, 6], [1000, 1, 999])


@pytest.mark.parametrize("sizes", SIZES)
def test_a_stratified_sample_keeps_each_class_within_one_of_its_share(sizes):
    labels = make_labels(sizes)
    num = len(labels)
    for count in sorted({0, 1, 2, num // 3, num // 2, num - 1, num} & set(range(num + 1))):
        chosen = stratified_sample(labels, count, seed=4)
        assert len(chosen) == count
        assert len(chosen.unique()) == count
        assert torch.equal(chosen, chosen.sort().values)
        taken = labels[chosen].bincount(minlength=len(sizes)).tolist()
        for size, of_class in zip(sizes, taken, strict=True):
            assert abs(of_class - size * count / num) < 1
            assert of_class <= size


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("num_samples", [2, 101])
def test_a_split_in_two_keeps_the_order(num_samples, fraction):
    images = torch.arange(num_samples, dtype=torch.uint8).view(-1, 1, 1, 1)
    rest, part = stratified_split(Split(images, make_labels([num_samples]), ("a",)), fraction, 3)
    assert len(part.labels) == min(num_samples - 1, max(1, round(num_samples * fraction)))
    found = [s.images.flatten().tolist() for s in (rest, part)]
    assert found == [sorted(part) for part in found]
    assert sorted(found[0] + found[1]) == list(range(num_samples))


def resized(images, size):
    """Return all images resized; check that resizing some of them gives the same result."""
    lazily = resize(
        Split(images, torch.zeros(len(images)).long(), ("a",)), EvalTransform(size, "squash")
    )
    found = in_memory(lazily, num_workers=1).images
    some = torch.arange(len(images) - 1, -1, -5)
    assert lazily.images.shape == found.shape
    assert torch.equal(lazily.images[some], found[some])
    assert torch.equal(lazily.select(some).images[torch.arange(len(some))], found[some])
    assert lazily.images[some[:0]].shape == found[:0].shape
    return found


@pytest.mark.parametrize("size", [7, 32])
@pytest.mark.parametrize(("num_images", "in_chans", "height"), [(1, 1, 28), (3, 3, 17)])
def test_resize_equals_torchvision_on_the_whole(num_images, in_chans, height, size):
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, in_chans, height, height + 2)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    found = resized(images, size)
    assert found.dtype == torch.uint8
    assert torch.equal(found, v2.Resize((size, size), antialias=True)(images))


@pytest.mark.parametrize("num_images", [1, 1001])
def test_channel_statistics_equal_naive_mean_and_std(num_images):
    generator = torch.Generator().manual_seed(1)
    shape = (num_images, 3, 5, 4)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images[:, 1] //= 4
    mean, std = channel_statistics(images)
    for channel in range(3):
        values = images[:, channel].double() / 255
        assert mean[channel] == pytest.approx(values.mean().item(), abs=5.1e-5)  # four decimals
        assert std[channel] == pytest.approx(values.std(correction=0).item(), abs=5.1e-5)


def test_channel_statistics_of_one_gray_can_be_divided_by():
    mean, std = channel_statistics(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8))
    assert mean == (0.2,)
    assert std[0] > 0


@pytest.mark.parametrize("num_images", [1, 10_001, 20_000_000])
def test_sampled_positions_are_within_any_number_of_images(num_images):
    """Of 20 million images the last was at position 20,000,000: float32 rounds 19,999,999 up."""
    found = sample_positions(num_images)
    assert len(found) == min(num_images, 10_000)
    assert (found[0], found[-1]) == (0, num_images - 1)
    assert (found.diff() > 0).all()


def memory_of(split):
    return math.prod(split.images.shape)


def test_images_are_resized_in_memory_only_where_all_splits_fit():
    """Otherwise they are resized batch by batch, with identical results."""
    settings = config("digits", image_size=40, max_train_samples=50, max_eval_samples=20)
    eager = load_splits(settings, math.inf, 1)
    needed = sum(map(memory_of, (eager.train, eager.val, eager.test)))
    assert torch.equal(load_splits(settings, needed, 1).train.images, eager.train.images)
    lazy = load_splits(settings, needed - 1, 1)
    for name in ("train", "val", "test"):
        images = getattr(lazy, name).images
        assert not isinstance(images, torch.Tensor)
        assert torch.equal(images[torch.arange(len(images))], getattr(eager, name).images)
    assert (lazy.mean, lazy.std) == (eager.mean, eager.std)
    assert lazy.fingerprints == eager.fingerprints


@pytest.mark.parametrize(("missing", "kind"), [(0, "resident"), (1, "streaming")])
def test_training_budgets_memory_for_all_splits_together(tmp_path, monkeypatch, missing, kind):
    """If each split were considered alone, all of them could fill the GPU."""
    words = ["--dataset", "digits", "--max-train-samples", "20", "--max-eval-samples", "10"]
    words += ["--image-size", "32", "--epochs", "1", "--recipe", "smoke", "--quiet"]
    words += ["--threads", "1", "--output-dir", str(tmp_path)]
    needed = 32**2 * (20 + 2 * 10)
    monkeypatch.setattr(loaders, "memory_for_data", lambda device: needed - missing)
    loaders_used = []

    def build(*given, **settings):
        loaders_used.append(build_loader(*given, **settings))
        return loaders_used[-1]

    build_loader = loaders.build_loader
    monkeypatch.setattr(loaders, "build_loader", build)
    assert train.main(words).exit_code == 0
    expected = loaders.ResidentLoader if kind == "resident" else loaders.StreamingLoader
    assert len(loaders_used) == 3
    assert {type(loader) for loader in loaders_used} == {expected}


def write_idx(folder, suffix="", num_train=17, num_test=3, classes=10):
    """Write a synthetic MNIST to IDX files; return (images, labels) of both splits."""
    folder.mkdir(parents=True)
    parts = []
    for name, num in ("train", num_train), ("t10k", num_test):
        generator = torch.Generator().manual_seed(num)
        images = torch.randint(0, 256, (num, 28, 28), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(num) % classes).to(torch.uint8)
        for kind, array in ("images-idx3", images), ("labels-idx1", labels):
            head = bytes([0, 0, 8, array.ndim])
            head += b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = head + array.numpy().tobytes()
            path = folder / f"{name}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
        parts.append((images, labels.long()))
    return parts


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("dataset", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_idx_files_are_read_as_they_are_or_gzipped(tmp_path, dataset, folder, suffix):
    parts = write_idx(tmp_path / folder / "raw", suffix)
    splits = load(dataset, data_dir=str(tmp_path), image_size=28, val_fraction=0.0)
    for split, (images, labels) in zip((splits.train, splits.test), parts, strict=True):
        assert torch.equal(split.images, images[:, None])
        assert torch.equal(split.labels, labels)
        assert split.labels.dtype == torch.int64
        assert len(split.class_names) == 10
    assert (splits.mean, splits.std) == (DATASETS[dataset].mean, DATASETS[dataset].std)


class Payload:
    """Create a directory when unpickled."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_p4_a_cifar_archive_of_another_md5_is_not_unpickled(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    kind = getattr(datasets, dataset.upper())
    folder = tmp_path / "data" / kind.base_folder
    folder.mkdir(parents=True)
    for name, _ in (*kind.train_list, *kind.test_list, (kind.meta["filename"], "")):
        (folder / name).write_bytes(pickle.dumps(Payload()))
    monkeypatch.setattr(kind, "download", lambda self: None)  # no network
    with pytest.raises(UserError):
        load(dataset, data_dir="data")
    assert not (tmp_path / "marker").exists()


def test_p6_validation_is_cut_from_training_and_test_is_apart():
    whole = load("digits", val_fraction=0.0)
    cut = load("digits", val_fraction=0.1)
    assert (whole.selection_split, cut.selection_split) == ("test", "validation")
    assert [len(s.labels) for s in (cut.train, cut.val, cut.test)] == [1294, 144, 359]
    assert labeled_images(cut.test) == labeled_images(whole.test)
    assert labeled_images(cut.train) + labeled_images(cut.val) == labeled_images(whole.train)
    everything = load("digits", test_fraction=0.01, val_fraction=0.0)
    everything = labeled_images(everything.train) + labeled_images(everything.test)
    assert (
        labeled_images(cut.train) + labeled_images(cut.val) + labeled_images(cut.test) == everything
    )
    for split in (cut.train, cut.val, cut.test):
        share = split.labels.bincount() / len(split.labels)
        assert share.min() > 0.085  # stratified
        assert share.max() < 0.115


def test_p6_without_a_validation_cut_the_test_split_is_used_and_named():
    splits = load("digits", val_fraction=0.0)
    assert splits.val is splits.test
    with pytest.raises(ValueError, match="no validation split"):
        load_split(config("digits", val_fraction=0.0), "val", math.inf, 1)


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_one_split_alone_is_the_same_and_has_the_same_fingerprint(name):
    splits = load("digits", max_eval_samples=50)
    split, fingerprint = load_split(config("digits", max_eval_samples=50), name, math.inf, 1)
    assert torch.equal(split.images, getattr(splits, name).images)
    assert torch.equal(split.labels, getattr(splits, name).labels)
    assert fingerprint == splits.fingerprints[name]
    assert len(set(splits.fingerprints.values())) == 3


def test_all_of_the_data_is_every_sample_of_every_part(tmp_path):
    split, _ = load_split(config("digits"), "all", math.inf, 1)
    assert len(split.labels) == 1797
    splits = load("digits")
    expected = [labeled_images(part) for part in (splits.train, splits.val, splits.test)]
    assert labeled_images(split) == expected[0] + expected[1] + expected[2]

    for path in ("train/a/0", "train/b/0", "train/b/1", "val/a/0", "val/b/0"):
        make_picture(tmp_path / f"{path}.png")
    folder = config(str(tmp_path))
    for memory in (math.inf, 0):
        split, _ = load_split(folder, "all", memory, 1)
        assert split.files() == [
            f"{path}.png" for path in ("train/a/0", "train/b/0", "train/b/1", "val/a/0", "val/b/0")
        ]
        assert split.labels.tolist() == [0, 1, 1, 0, 1]
        assert split.images[torch.arange(5)].shape == (5, 3, 32, 32)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_both_parts_of_a_split_have_samples_of_every_class(fraction):
    sizes = [1, 2, 3, 40]
    whole = Split(torch.zeros(46, 1, 1, 1, dtype=torch.uint8), make_labels(sizes), tuple("abcd"))
    rest, part = (
        s.labels.bincount(minlength=4).tolist() for s in stratified_split(whole, fraction, 0)
    )
    assert [a + b for a, b in zip(rest, part, strict=True)] == sizes
    assert (rest[0], part[0]) == (1, 0)  # the only sample of a class is trained on
    assert min(rest[1:] + part[1:]) >= 1


def test_the_fractions_of_a_directory_are_those_of_the_options(tmp_path):
    folder = str(write_shapes(tmp_path / "shapes", 60))
    splits = load(folder, test_fraction=0.4, val_fraction=0.5)
    sizes = [len(split.labels) for split in (splits.train, splits.val, splits.test)]
    assert sizes == [18, 18, 24]  # 24 are 0.4 of 60


def test_a_split_without_images_of_a_class_causes_a_warning(tmp_path, capsys):
    for name, count in (("a", 1), ("b", 2), ("c", 9)):
        for i in range(count):
            make_picture(tmp_path / name / f"{i}.png")
    folder = config(str(tmp_path))
    load_splits(folder, 0, 1)
    assert capsys.readouterr().err == (
        "warning: the test split has no image of class a: too few images\n"
        "warning: the validation split has no image of classes a, b: too few images\n"
    )
    load_splits(replace(folder, max_train_samples=2, max_eval_samples=1, val_fraction=0.0), 0, 1)
    assert capsys.readouterr().err == (
        "warning: the training split has no image of classes a, b: --max-train-samples is too "
        "small\nwarning: the test split has no image of classes a, b: --max-eval-samples is too "
        "small\n"
    )


def test_p7_a_class_without_training_images_is_refused(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", num_train=7)
    with pytest.raises(ValueError, match="training split has no image of classes 7, 8, 9"):
        load("mnist", data_dir=str(tmp_path), val_fraction=0.0)
    with pytest.raises(ValueError, match="training split has no image of classes 7, 8, 9"):
        load("mnist", data_dir=str(tmp_path), val_fraction=0.0, max_train_samples=8)


def test_p6_no_release_of_pytorch_can_move_a_sample_to_another_split():
    """The digests were taken when PyTorch 2.14's torch.randperm drew the splits of results/."""
    random = np.random.RandomState(7)
    drawn = [random_choice(num, num, random) for num in (1, 0, 2, 1000, 3, 20_000)]
    assert [sorted(numbers.tolist()) for numbers in drawn] == [list(range(len(n))) for n in drawn]
    assert digest(*drawn) == "245bb56a7501b4fc"
    random = np.random.RandomState(7)
    for whole in drawn:  # what is drawn later does not depend on how many were asked for
        count = len(whole) // 3
        assert torch.equal(random_choice(len(whole), count, random), whole[:count])
    labels = make_labels_in_order([6000, 5900, 6100])
    assert digest(stratified_sample(labels, 1800, 2**31 - 1)) == "6db773e36478807b"
    splits = load("digits")
    assert digest(splits.train.images, splits.val.images, splits.test.images) == "70526841e7ab6328"


def test_p6_the_cut_follows_split_seed_and_nothing_else():
    assert config("digits", seed=1) == config("digits", seed=2)
    torch.manual_seed(1)
    first = load("digits")
    torch.manual_seed(2)
    second, other = load("digits"), load("digits", split_seed=1)
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(first, name).images, getattr(second, name).images)
        assert torch.equal(getattr(first, name).labels, getattr(second, name).labels)
        assert labeled_images(getattr(first, name)) != labeled_images(getattr(other, name))


def test_a_quarter_of_the_images_has_an_erased_rectangle_of_the_mean_color():
    splits = load_splits(config("digits"), math.inf, 1, augment=("erasing",))
    white = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    images = torch.stack([splits.train.images.transform(white, seed) for seed in range(100)])
    assert images.unique().tolist() == [round(255 * splits.mean[0]), 255]
    assert 15 <= (images < 255).flatten(1).any(1).sum() <= 35


def test_digits_are_the_published_ones():
    images, labels = load_digits()
    assert (images.shape, images.dtype) == ((1797, 1, 8, 8), torch.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), torch.int64)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    published = sklearn.datasets.load_digits()
    levels = (images[:, 0] * (16 / 255)).round()  # exact: levels lie 16 gray values apart
    assert np.array_equal(levels, published.images)
    assert np.array_equal(labels, published.target)
