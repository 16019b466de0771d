"""Transforms: of images for evaluation, of single samples in worker processes, and of batches.

Batches are augmented and normalized on their device. `SampleTransform` is for augmentations that
need the whole image at its own size, or are different operations for each sample.

The augmentation of a sample depends on (seed, epoch, sample) alone (promise P2): 64 random bits per
sample give five draws of 12 bits each, in integer arithmetic, with the same result on every device.

Mixup and cutmix mix a sample with the preceding one of the global batch, and the first with the
last. Batches are shuffled in every epoch, so that this is a random partner, and a process needs
only one image more than its own contiguous part. The parameters of a mix depend on (seed, epoch,
batch) alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_PADDING = 4  # pixels at 32; scaled with the image
CUTOUT_FRACTION = 0.25  # side of the hole / side of the image (8 of 32 pixels)
DRAW_BITS = 12
CROP_AREA = (0.35, 1.0)  # of resized-crop, as fractions of the image's


def draw(bits: Tensor, k: int, high: int) -> Tensor:
    """Return the k-th of five independent draws per sample, uniform in [0, high), int64 [n]."""
    return ((bits >> (DRAW_BITS * k)) % 2**DRAW_BITS * high) >> DRAW_BITS


def crop(images: Tensor, bits: Tensor) -> Tensor:
    """Return images [n, C, H, W] shifted by up to an eighth of their side, with black padding."""
    n, _, height, width = images.shape
    padding = max(1, CROP_PADDING * height // 32)
    padded = F.pad(images, (padding,) * 4)
    # A view, [n, C, 2 * padding + 1, 2 * padding + 1, H, W].
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    top, left = draw(bits, 0, 2 * padding + 1), draw(bits, 1, 2 * padding + 1)
    return windows[torch.arange(n, device=images.device), :, top, left]


def flip(images: Tensor, bits: Tensor) -> Tensor:
    """Return images [n, C, H, W], each flipped horizontally with probability 1/2."""
    is_flipped = draw(bits, 2, 2).bool()
    return torch.where(is_flipped[:, None, None, None], images.flip(3), images)


def cutout(images: Tensor, bits: Tensor) -> Tensor:
    """Return images [n, C, H, W] with a black square at a random place (DeVries, Taylor 2017)."""
    height, width = images.shape[2:]
    side = max(1, int(height * CUTOUT_FRACTION))
    top = draw(bits, 3, height + 1)[:, None] - side // 2
    left = draw(bits, 4, width + 1)[:, None] - side // 2
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + side)  # [n, H]
    in_columns = (columns >= left) & (columns < left + side)  # [n, W]
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


@dataclass(frozen=True)
class EvalTransform:
    """Crops and resizes images as they are evaluated.

    With `fit` "crop", this gives the central square whose side is `crop_pct` of the shorter side,
    as when the shorter side is resized to `size` / `crop_pct` before a center crop. "pad" adds
    black borders to the whole image, "squash" changes its aspect ratio. `interpolation` is
    "bilinear" or "bicubic"; both are antialiased and round to uint8.
    """

    size: int  # pixels per side
    fit: str = "crop"
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    @property
    def decode_size(self) -> int:
        """Return the `size` for `decode`, which keeps at least twice as many pixels per side.

        That is enough unless less than half of the shorter side is cropped.
        """
        part = self.crop_pct if self.fit == "crop" else 1
        return math.ceil(self.size * max(1, 0.5 / part)) if part else self.size

    @classmethod
    def of(cls, config: Any) -> Self:
        """Return the transform that a `DataConfig` describes."""
        return cls(config.image_size, config.fit, config.crop_pct, config.interpolation)

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 images [..., C, H, W] as [..., C, size, size]."""
        height, width = images.shape[-2:]
        size = self.size
        if self.fit == "pad" and height != width:
            scale = size / max(height, width)
            shape = [max(1, round(height * scale)), max(1, round(width * scale))]
            top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
            borders = [left, size - shape[1] - left, top, size - shape[0] - top]
            return F.pad(self._resize(images, shape), borders)
        # Crop first: resizing an image of 1 x 5000 pixels would make it huge.
        if self.fit == "crop":
            side = max(1, round(min(height, width) * self.crop_pct))
            top, left = round((height - side) / 2), round((width - side) / 2)
            images = images[..., top : top + side, left : left + side]
        if images.shape[-2:] == (size, size):
            return images
        return self._resize(images, [size, size])

    def _resize(self, images: Tensor, shape: list[int]) -> Tensor:
        # torchvision does the same, but importing it takes seconds.
        batch = images.reshape(-1, *images.shape[-3:])
        resized = F.interpolate(batch, shape, mode=self.interpolation, antialias=True)
        return resized.reshape(*images.shape[:-2], *shape)


def to_grayscale(images: Tensor) -> Tensor:
    """Return grayscale images uint8 [..., 1, H, W] of RGB images [..., 3, H, W].

    The weights are torchvision's, which add up to 0.9999. torchvision truncates the result for
    uint8, so that 255 became 254; rounding keeps the values of gray pixels.
    """
    red, green, blue = images.float().split(1, -3)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).round_().byte()


class SampleTransform:
    """Augments single images by torchvision's transforms, as `names` of the schema say.

    Without resized-crop, `square` makes images square, as in evaluation. `fill` is the color of
    erased rectangles, one value from 0 to 1 for each channel.
    """

    def __init__(self, names: Sequence[str], square: EvalTransform, fill: Sequence[float]):
        from torchvision.transforms import v2

        self.crops, self.square = "resized-crop" in names, square
        self.decode_size = square.size if self.crops else square.decode_size
        mode = v2.InterpolationMode(square.interpolation)
        erased = [round(255 * value) for value in fill]
        transforms = {
            "resized-crop": v2.RandomResizedCrop(square.size, scale=CROP_AREA, interpolation=mode),
            "trivialaugment": v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR),
            "randaugment": v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR),
            "erasing": v2.RandomErasing(p=0.25, value=erased),
        }
        self.transforms = [transforms[name] for name in transforms if name in names]

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return a uint8 image [C, H, W] as [C, size, size], a function of the image and `seed`."""
        if not self.crops:
            image = self.square(image)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed % 2**32)
            for transform in self.transforms:
                image = transform(image)
        return image


AUGMENTATIONS = {"crop": crop, "flip": flip, "cutout": cutout}


class BatchTransform:
    """Augments and normalizes uint8 images.

    Mixing, `mixup`, is left to the loaders, which know the order of samples in the global batch.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[str],
        device: torch.device | str,
        mixup_alpha: float = 1.0,
    ):
        self.augment = tuple(name for name in augment if name not in BATCH_MIXES)
        mixes = tuple(name for name in augment if name in BATCH_MIXES)
        self.mixup = Mixup(mixes, mixup_alpha) if mixes else None
        self.scale = (1 / (255 * torch.tensor(std))).view(-1, 1, 1).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1).to(device)

    def __call__(self, images: Tensor, bits: Tensor | None = None) -> Tensor:
        """Return uint8 images [n, C, H, W] as float32, augmented if `bits` [n] are given."""
        if bits is not None:
            for name in self.augment:
                images = AUGMENTATIONS[name](images, bits)
        scaled = images.float()
        return torch.addcmul(self.shift, scaled, self.scale, out=scaled)


BATCH_MIXES = ("mixup", "cutmix")


@dataclass(frozen=True)
class BatchMix:
    """The parameters by which the images of a batch are mixed."""

    ratio: float  # of the image and of its label; its partner has 1 - ratio
    # The partner's pixels in cutmix, (top, bottom, left, right); None: mixup.
    box: tuple[int, int, int, int] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return images [n, C, H, W], each mixed with its predecessor in [n + 1, C, H, W]."""
        own, partners = images[1:], images[:-1]
        if self.box is None:
            return own.mul(self.ratio).add_(partners.mul(1 - self.ratio))
        top, bottom, left, right = self.box
        mixed = own.clone()
        mixed[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        return mixed


@dataclass(frozen=True)
class Mixup:
    """Draws the `BatchMix` of each batch; with several `names`, one of them at random."""

    names: Sequence[str]
    alpha: float  # ratios are drawn from Beta(alpha, alpha)

    def draw(self, seed: int, epoch: int, batch: int, height: int, width: int) -> BatchMix:
        """Return the mix of a batch of images of this height and width.

        mixup: Zhang et al. 2018, "mixup: Beyond empirical risk minimization". cutmix: Yun et al.
        2019, "CutMix": the center of the box is uniform, and the box is clipped at the border,
        after which the ratio is computed.
        """
        generator = random.Random(f"{seed} {epoch} {batch}")
        name = generator.choice(self.names)
        ratio = generator.betavariate(self.alpha, self.alpha)
        if name == "mixup":
            return BatchMix(ratio)
        side = math.sqrt(1 - ratio)  # as a fraction of the image's
        top, bottom = _span(generator.randrange(height), side, height)
        left, right = _span(generator.randrange(width), side, width)
        area = (bottom - top) * (right - left)
        return BatchMix(1 - area / (height * width), (top, bottom, left, right))


def _span(center: int, fraction: float, length: int) -> tuple[int, int]:
    """Return (start, stop) of `fraction` of `length` around `center`, clipped to [0, length]."""
    half = int(fraction * length / 2)
    return max(0, center - half), min(length, center + half)
