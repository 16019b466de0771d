"""Mixing the pictures of a batch in pairs, mixup and cutmix (promise P2).

A sample is mixed with the one before it in the global batch, the first with the last: batches are
drawn anew in each epoch, so that this is a partner drawn at random, and a process, whose part is a
stretch of the batch, needs one picture more than its own. What is drawn for the batch as a whole is
a function of (seed, epoch, batch), drawn on each process alike.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CROP_PADDING = 4  # pixels at 32; scaled with the image
CUTOUT_FRACTION = 0.25  # side of the hole / side of the image (8 of 32 pixels)
DRAW_BITS = 12


def draw(bits: Tensor, k: int, high: int) -> Tensor:
    """The k-th of five independent draws of each sample, uniform in 0 ... high - 1, int64 [n]."""
    return ((bits >> (DRAW_BITS * k)) % 2**DRAW_BITS * high) >> DRAW_BITS


def crop(images: Tensor, bits: Tensor) -> Tensor:
    """Each image [n, C, H, W] shifted by up to an eighth of its side; what comes in is black."""
    n, _, height, width = images.shape
    padding = max(1, CROP_PADDING * height // 32)
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(
        3, width, 1
    )  # [n, C, 2p + 1, 2p + 1, H, W], a view
    top, left = draw(bits, 0, 2 * padding + 1), draw(bits, 1, 2 * padding + 1)
    return windows[torch.arange(n, device=images.device), :, top, left]


def flip(images: Tensor, bits: Tensor) -> Tensor:
    """Half of the images [n, C, H, W] mirrored left to right."""
    mirrored = draw(bits, 2, 2).bool()
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def cutout(images: Tensor, bits: Tensor) -> Tensor:
    """Each image [n, C, H, W] with a black square, centred anywhere (DeVries, Taylor 2017)."""
    height, width = images.shape[2:]
    side = max(1, int(height * CUTOUT_FRACTION))
    top = draw(bits, 3, height + 1)[:, None] - side // 2
    left = draw(bits, 4, width + 1)[:, None] - side // 2
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + side)  # [n, H]
    in_columns = (columns >= left) & (columns < left + side)  # [n, W]
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


AUGMENTATIONS = {"crop": crop, "flip": flip, "cutout": cutout}


class BatchTransform:
    """From stored pixels to what a network takes: augmented, scaled, normalised.

    What `augment` names of MIXES is left to the loaders, which know a batch's pairs: `mixup`.
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
        """float32 [n, C, H, W] of uint8 [n, C, H, W]; augmented where given the samples' `bits`."""
        if bits is not None:
            for name in self.augment:
                images = AUGMENTATIONS[name](images, bits)
        scaled = images.float()
        return torch.addcmul(self.shift, scaled, self.scale, out=scaled)


BATCH_MIXES = ("mixup", "cutmix")


@dataclass(frozen=True)
class BatchMix:
    """How the pictures of one batch are mixed."""

    share: float  # of its own in a picture, and of its own label in the loss; the rest: its partner
    # What is the partner's, (top, bottom, left, right) in pixels; None: all, laid over.
    box: tuple[int, int, int, int] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """[n, C, H, W] of [n + 1, C, H, W], each mixed with the one before it; none of none."""
        own, partners = images[1:], images[:-1]
        if self.box is None:
            return own.mul(self.share).add_(partners.mul(1 - self.share))
        top, bottom, left, right = self.box
        mixed = own.clone()
        mixed[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        return mixed


@dataclass(frozen=True)
class Mixup:
    """Draws a Mix for each batch; with several `names`, one of them at random."""

    names: Sequence[str]
    alpha: float  # shares are of Beta(alpha, alpha)

    def draw(self, seed: int, epoch: int, batch: int, height: int, width: int) -> BatchMix:
        """The mix of a batch of pictures of this size.

        mixup: Zhang et al. 2018, "mixup: Beyond empirical risk minimization". cutmix: Yun et al.
        2019, "CutMix", whose box is centred anywhere and cut at the border; the share is that of
        what is left.
        """
        generator = random.Random(f"{seed} {epoch} {batch}")
        name = generator.choice(self.names)
        share = generator.betavariate(self.alpha, self.alpha)
        if name == "mixup":
            return BatchMix(share)
        side = math.sqrt(1 - share)
        top, bottom = _span(generator.randrange(height), side, height)
        left, right = _span(generator.randrange(width), side, width)
        area = (bottom - top) * (right - left)
        return BatchMix(1 - area / (height * width), (top, bottom, left, right))


def _span(centre: int, share: float, length: int) -> tuple[int, int]:
    """What of 0 ... `length` is within half of that share of it from `centre`."""
    half = int(share * length / 2)
    return max(0, centre - half), min(length, centre + half)
