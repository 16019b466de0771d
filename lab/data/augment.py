"""Augmentation and normalisation of whole batches on their device, random by sample (promise P2).

How sample i is augmented in epoch e is a function of (seed, e, i) alone. So there is no random
state: one 64-bit hash a sample gives five 12-bit draws, computed with integer arithmetic that is
the same on every device.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.data.mix import MIXES, Mixer

CROP_PADDING = 4  # pixels at 32; scaled with the image
CUTOUT_FRACTION = 0.25  # side of the hole / side of the image (8 of 32 pixels)
DRAW_BITS = 12


def random_bits(
    seed: int, epoch: int, num_samples: int, device: torch.device | str, stream: int = 0
) -> Tensor:
    """Random bits of every sample of an epoch, int64 [N]; independent ones for each `stream`.

    A counter run through the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators").
    """
    golden = 0x9E3779B97F4A7C15
    start = golden + seed * 0xD1342543DE82EF95 + epoch * 0xDABA0B6EB09322E3
    start = (start + stream * 0xA24BAED4963EE407) % 2**64
    x = torch.arange(num_samples, device=device) * _signed(golden) + _signed(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return x ^ _shift_right(x, 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # logical: int64's own shift copies the sign


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


STEPS = {"crop": crop, "flip": flip, "cutout": cutout}


class Preprocess:
    """From stored pixels to what a network takes: augmented, scaled, normalised.

    What `augment` names of MIXES is left to the loaders, which know a batch's pairs: `mixer`.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Sequence[str],
        device: torch.device | str,
        mix_alpha: float = 1.0,
    ):
        self.augment = tuple(name for name in augment if name not in MIXES)
        mixes = tuple(name for name in augment if name in MIXES)
        self.mixer = Mixer(mixes, mix_alpha) if mixes else None
        self.scale = (1 / (255 * torch.tensor(std))).view(-1, 1, 1).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1).to(device)

    def __call__(self, images: Tensor, bits: Tensor | None = None) -> Tensor:
        """float32 [n, C, H, W] of uint8 [n, C, H, W]; augmented where given the samples' `bits`."""
        if bits is not None:
            for name in self.augment:
                images = STEPS[name](images, bits)
        scaled = images.float()
        return torch.addcmul(self.shift, scaled, self.scale, out=scaled)
