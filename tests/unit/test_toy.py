"""The data sets that need no download: what they hold, and that shapes defeat a linear model."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn import datasets

from lab.data.digits import DIGITS_FILE, load_digits
from lab.data.shapes import CHUNK, SHAPE_NAMES, make_shapes


def test_digits_are_the_published_ones():
    images, labels = load_digits()
    assert (images.shape, images.dtype) == ((1797, 1, 8, 8), torch.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), torch.int64)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    published = datasets.load_digits()
    levels = (images[:, 0] * (16 / 255)).round()  # exact: levels lie 16 grey values apart
    assert np.array_equal(levels, published.images)
    assert np.array_equal(labels, published.target)


def test_digits_file_is_small_and_names_its_source():
    assert DIGITS_FILE.stat().st_size < 200_000
    with safe_open(DIGITS_FILE, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["about"]
    assert "10.24432/C50P49" in metadata["about"]
    assert "CC BY 4.0" in metadata["about"]


@pytest.mark.parametrize("num_samples", [1, 9, CHUNK - 1, CHUNK, CHUNK + 1])
def test_shapes_shorter_set_is_a_prefix(num_samples):
    images, labels = make_shapes(num_samples, seed=3)
    longer_images, longer_labels = make_shapes(2 * CHUNK + 1, seed=3)
    assert (images.shape, images.dtype) == ((num_samples, 3, 32, 32), torch.uint8)
    assert (labels.shape, labels.dtype) == ((num_samples,), torch.int64)
    assert torch.equal(images, longer_images[:num_samples])
    assert torch.equal(labels, longer_labels[:num_samples])


def test_shapes_are_balanced_and_all_different():
    images, labels = make_shapes(2 * CHUNK + 3, seed=0)
    counts = labels.bincount(minlength=len(SHAPE_NAMES))
    assert len(counts) == len(SHAPE_NAMES)
    assert counts.max() - counts.min() <= 1
    assert len(images.flatten(1).unique(dim=0)) == len(images)  # no chunk repeats another


def test_shapes_seeds_differ_and_leave_global_randomness_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = make_shapes(50, seed=0)[0], make_shapes(50, seed=1)[0]
    assert (first != second).flatten(1).any(1).all()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 0), (10, -1), (10, 2**64)])
def test_shapes_refuse_what_they_cannot_draw(arguments):
    with pytest.raises(ValueError, match=r"Ask for|Choose"):
        make_shapes(*arguments)


@pytest.mark.parametrize("penalty", [10.0, 1000.0])
def test_shapes_defeat_a_linear_model(penalty):
    images, labels = make_shapes(4000, seed=0)
    pixels = images.flatten(1).float() / 255
    train, test = pixels[:3000], pixels[3000:]
    mean = train.mean(0)
    targets = torch.nn.functional.one_hot(labels[:3000]).float() - 1 / len(SHAPE_NAMES)
    # Ridge regression in its dual form: the system has one row a sample.
    gram = (train - mean) @ (train - mean).T + penalty * torch.eye(len(train))
    weights = (train - mean).T @ torch.linalg.solve(gram, targets)

    train_accuracy = ((train - mean) @ weights).argmax(1).eq(labels[:3000]).float().mean()
    test_accuracy = ((test - mean) @ weights).argmax(1).eq(labels[3000:]).float().mean()
    assert train_accuracy > 0.30  # the model was fitted
    assert test_accuracy < 0.25
