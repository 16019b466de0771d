"""P2: augmentation depends on (seed, epoch, sample) alone; each one is compared to a loop."""

import math

import pytest
import torch
from torchvision import transforms

from lab.data.sampler import random_bits
from lab.data.transforms import BatchTransform, crop, cutout, draw, flip

SIZES = [28, 32]
STEPS = ("crop", "flip", "cutout")
GOLDEN = [
    "1c7a1c153a8a05ab",
    "cf33c7a8dba60b99",
    "93b1d8e36a8a9b9c",
]  # seed 42, epoch 3, samples 0 to 2


def make_images(num_images, in_chans, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_images, in_chans, size, size)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)  # none is black


def reference_bits(seed, epoch, i):
    """Return the bits of sample i as an unsigned integer, in Python's integer arithmetic."""
    golden = 0x9E3779B97F4A7C15
    start = seed * 0xD1342543DE82EF95 + epoch * 0xDABA0B6EB09322E3
    x = (start + (i + 1) * golden) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def reference_draw(bits, k, high):
    return (bits % 2**64 // 2 ** (12 * k) % 4096) * high // 4096


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 1), (2**31 - 1, 300)])
def test_p2_bits_are_those_of_integer_arithmetic(seed, epoch):
    found = random_bits(seed, epoch, 1001, "cpu")
    assert found.dtype == torch.int64
    expected = [reference_bits(seed, epoch, i) for i in range(1001)]
    assert [b % 2**64 for b in found.tolist()] == expected


def test_p2_bits_never_change():
    # Seed 0, epoch 0 is SplitMix64 seeded with 0, whose first number is known.
    assert f"{random_bits(0, 0, 1, 'cpu').item() % 2**64:x}" == "e220a8397b1dcdaf"
    golden = [random_bits(42, 3, 3, "cpu")[i].item() % 2**64 for i in range(3)]
    assert [f"{x:016x}" for x in golden] == GOLDEN


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("high", [2, 9, 65])
def test_draws_are_uniform_over_samples_and_over_epochs(high):
    over_samples = random_bits(11, 4, 40_000, "cpu")
    over_epochs = torch.cat([random_bits(11, e, 10, "cpu") for e in range(500)])
    limit = high - 1 + 5 * math.sqrt(2 * (high - 1)) + 5  # five standard deviations and a bit
    for bits in (over_samples, over_epochs):
        for k in range(5):
            counts = draw(bits, k, high).bincount(minlength=high)
            assert len(counts) == high
            assert chi_square(counts.double()) < limit


def test_draws_of_a_sample_are_independent():
    bits = random_bits(5, 1, 40_000, "cpu")
    for k in range(5):
        for other in range(k):
            pairs = draw(bits, k, 8) * 8 + draw(bits, other, 8)
            assert chi_square(pairs.bincount(minlength=64).double()) < 63 + 5 * math.sqrt(126)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_crop_is_a_window_of_the_padded_image(size, in_chans):
    images, bits = make_images(101, in_chans, size), random_bits(1, 2, 101, "cpu")
    padding = size // 8
    seen = set()
    for image, b, found in zip(images, bits.tolist(), crop(images, bits), strict=True):
        top, left = (reference_draw(b, k, 2 * padding + 1) for k in (0, 1))
        padded = torch.zeros(in_chans, size + 2 * padding, size + 2 * padding, dtype=torch.uint8)
        padded[:, padding : padding + size, padding : padding + size] = image
        assert torch.equal(found, padded[:, top : top + size, left : left + size])
        seen |= {top, left}
    assert seen == set(range(2 * padding + 1))  # up to an eighth each way


def test_flip_mirrors_about_half_left_to_right():
    images, bits = make_images(401, 3, 32), random_bits(1, 2, 401, "cpu")
    num_mirrored = 0
    for image, b, found in zip(images, bits.tolist(), flip(images, bits), strict=True):
        mirrored = reference_draw(b, 2, 2) == 1
        rows = [row[::-1] for row in image.flatten(0, 1).tolist()]
        expected = torch.tensor(rows, dtype=torch.uint8).view_as(image) if mirrored else image
        assert torch.equal(found, expected)
        num_mirrored += mirrored
    assert 150 < num_mirrored < 250


@pytest.mark.parametrize("size", SIZES)
def test_cutout_blackens_a_square_of_a_quarter_of_the_side(size):
    images, bits = make_images(301, 3, size), random_bits(1, 2, 301, "cpu")
    side = size // 4
    num_whole = 0
    for image, b, found in zip(images, bits.tolist(), cutout(images, bits), strict=True):
        y, x = (reference_draw(b, k, size + 1) for k in (3, 4))
        black = found.eq(0).all(0)
        assert torch.equal(found, image.masked_fill(black, 0))  # all else is as it was
        rows, columns = black.any(1).nonzero().flatten(), black.any(0).nonzero().flatten()
        assert int(black.sum()) == len(rows) * len(columns)  # a rectangle
        for line, center in ((rows, y), (columns, x)):
            inside = side // 2 < center < size - side // 2
            assert len(line) == side if inside else side // 2 <= len(line) <= side
            assert int(line[-1] - line[0]) + 1 == len(line)
            if inside:
                assert abs(float(line.double().mean()) + 0.5 - center) <= 0.5
        num_whole += int(black.sum()) == side**2
    assert num_whole > 100


@pytest.mark.parametrize("augment", [(), *[(s,) for s in STEPS], STEPS])
def test_p2_augmentation_does_not_depend_on_the_batch(augment):
    images = make_images(50, 3, 32)
    bits = random_bits(9, 3, 50, "cpu")
    transform = BatchTransform((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), augment, "cpu")
    whole = transform(images, bits)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(transform(images[order], bits[order]), whole[order])
    for part_size in (1, 7, 49):
        parts = zip(images.split(part_size), bits.split(part_size), strict=True)
        assert torch.equal(torch.cat([transform(i, b) for i, b in parts]), whole)
    other_epoch = transform(images, random_bits(9, 4, 50, "cpu"))
    assert torch.equal(other_epoch, whole) == (augment == ())


@pytest.mark.parametrize("step", [crop, flip, cutout])
def test_steps_take_an_empty_batch_and_leave_their_input_alone(step):
    assert step(make_images(0, 3, 32), random_bits(0, 0, 0, "cpu")).shape == (0, 3, 32, 32)
    images = make_images(5, 3, 32)
    before = images.clone()
    assert step(images, random_bits(0, 0, 5, "cpu")).dtype == torch.uint8
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.1307,), (0.3081,)), ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
)
def test_preprocess_equals_totensor_and_normalize(mean, std):
    images = torch.arange(256, dtype=torch.uint8).repeat(3 * len(mean), 1)
    images = images.view(3, len(mean), 16, 16)  # every gray level in every channel
    normalize = transforms.Normalize(mean, std)
    pictures = [image.permute(1, 2, 0).numpy() for image in images]
    expected = torch.stack([normalize(transforms.ToTensor()(p)) for p in pictures])
    found = BatchTransform(mean, std, STEPS, "cpu")(images)  # no bits: not augmented
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
