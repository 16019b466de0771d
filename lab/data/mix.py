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

from torch import Tensor

MIXES = ("mixup", "cutmix")


@dataclass(frozen=True)
class Mix:
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
class Mixer:
    """Draws a Mix for each batch; with several `names`, one of them at random."""

    names: Sequence[str]
    alpha: float  # shares are of Beta(alpha, alpha)

    def draw(self, seed: int, epoch: int, batch: int, height: int, width: int) -> Mix:
        """The mix of a batch of pictures of this size.

        mixup: Zhang et al. 2018, "mixup: Beyond empirical risk minimization". cutmix: Yun et al.
        2019, "CutMix", whose box is centred anywhere and cut at the border; the share is that of
        what is left.
        """
        generator = random.Random(f"{seed} {epoch} {batch}")
        name = generator.choice(self.names)
        share = generator.betavariate(self.alpha, self.alpha)
        if name == "mixup":
            return Mix(share)
        side = math.sqrt(1 - share)
        top, bottom = _span(generator.randrange(height), side, height)
        left, right = _span(generator.randrange(width), side, width)
        area = (bottom - top) * (right - left)
        return Mix(1 - area / (height * width), (top, bottom, left, right))


def _span(centre: int, share: float, length: int) -> tuple[int, int]:
    """What of 0 ... `length` is within half of that share of it from `centre`."""
    half = int(share * length / 2)
    return max(0, centre - half), min(length, centre + half)
