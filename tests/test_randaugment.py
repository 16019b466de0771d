"""P2: RandAugment's operations are torchvision's, and cut to the same grey level everywhere."""

import hashlib
import math

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode, RandAugment

from lab.data import randaugment
from lab.data.augment import draw, random_augment, random_bits
from lab.data.randaugment import OPERATIONS, apply

BLENDS = ("color", "contrast", "sharpness")  # half a grey level may be cut either way
GOLDEN = "fc98ee2f"  # of 40 pictures


def make_images(num_images, channels, size):
    """Noise without the darkest and the brightest greys, so that contrast can be stretched."""
    noise = draw(random_bits(0, 0, num_images * channels * size * size, "cpu"), 0, 240) + 8
    return noise.byte().view(num_images, channels, size, size)


def torchvisions(name, images, sign):
    """What its RandAugment, at its defaults, makes of a batch by one operation."""
    policy, size = RandAugment(), images.shape[2:]
    table = {key.lower(): key for key in policy._AUGMENTATION_SPACE}
    key = table[name.replace("-", "")]
    strengths, signed = policy._AUGMENTATION_SPACE[key]
    bins = strengths(policy.num_magnitude_bins, *size)
    strength = 0.0 if bins is None else float(bins[policy.magnitude])
    strength *= sign if signed else 1
    return policy._apply_image_or_video_transform(
        images, key, strength, InterpolationMode.NEAREST, {torch.Tensor: None}
    )


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28), (3, 33)])
def test_an_operation_is_torchvisions(channels, size, name):
    images, number = make_images(20, channels, size), list(OPERATIONS).index(name)
    for sign in (-1, 1):
        signs = torch.full((20,), max(0, sign))
        found = apply(images, torch.full((20,), number), signs).int()
        expected = torchvisions(name, images, sign).int()
        assert (found - expected).abs().max() <= (name in BLENDS)
        assert (found != expected).float().mean() < 0.1
        unchanged = name == "identity" or (name == "color" and channels == 1)
        assert torch.equal(found, images.int()) == unchanged


def test_the_operations_and_their_number_are_torchvisions():
    names = [name.lower() for name in RandAugment()._AUGMENTATION_SPACE]
    assert [name.replace("-", "") for name in OPERATIONS] == names
    assert RandAugment().num_ops == randaugment.NUM_OPERATIONS


def test_p2_whole_grey_levels_are_those_of_exact_arithmetic():
    """For every pair of grey levels; so no device's rounding makes another of them."""
    levels = torch.arange(256)
    images, others = levels.view(256, 1, 1, 1).expand(256, 1, 1, 256), levels.view(1, 1, 1, 256)
    for sign, percent in ((-1, 73), (1, 127)):
        exact = (images * percent + others * (100 - percent)).clamp(0, 25500) // 100
        signs = torch.full((256,), sign)
        for number_type in (torch.float32, torch.float64):
            found = randaugment.blend(images.to(number_type), others.to(number_type), signs)
            assert torch.equal(found.long(), exact)
    every = torch.cartesian_prod(*[torch.arange(0, 256, 3)] * 3).T.reshape(1, 3, -1, 1)
    grey = (299 * every[:, :1] + 587 * every[:, 1:2] + 114 * every[:, 2:]) // 1000
    assert torch.equal(randaugment._grey(every.byte()).long(), grey)


def test_p2_the_pictures_never_change():
    images = make_images(40, 3, 17)
    found = random_augment(images, random_bits(42, 3, 40, "cpu"))
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:8] == GOLDEN


def test_each_picture_is_changed_by_two_operations_drawn_alike(monkeypatch):
    """Apart from crop's draws, and from each other."""
    drawn = []

    def apply(images, operations, signs):
        drawn.append((operations, signs))
        return images

    monkeypatch.setattr(randaugment, "apply", apply)
    num_samples = 40_000
    bits = random_bits(5, 1, num_samples, "cpu")
    random_augment(torch.zeros(num_samples, 1, 1, 1, dtype=torch.uint8), bits)
    (first, first_sign), (second, second_sign) = drawn
    crops, count = draw(bits, 0, 9), len(OPERATIONS)
    pairs = [(first, second, count), (first, first_sign, 2), (second, second_sign, 2)]
    for a, b, high in [*pairs, (first, crops, 9), (second, crops, 9)]:
        counts = (a * high + b).bincount(minlength=count * high).double()
        assert len(counts) == count * high
        expected = num_samples / len(counts)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < len(counts) + 5 * math.sqrt(2 * len(counts)) + 10
