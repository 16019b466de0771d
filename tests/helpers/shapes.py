"""Synthetic RGB images for tests: a colored rectangle on a noisy background."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def make_shapes(num_samples: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return images uint8 [N, 3, size, size] and labels int64 [N], which count 0 to 9 in turn.

    The label decides where the rectangle is: in one of five columns, at the top or the bottom.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % 10
    images = torch.randint(0, 128, (num_samples, 3, size, size), generator=generator)
    colors = torch.randint(128, 256, (num_samples, 3, 1, 1), generator=generator)
    for image, color, label in zip(images, colors, labels.tolist(), strict=True):
        left, top = label % 5 * size // 5, label // 5 * size // 2
        image[:, top : top + size // 2, left : left + size // 5] = color
    return images.to(torch.uint8), labels


def write_shapes(root: Path, num_samples: int) -> Path:
    """Write the images as ROOT/class-LABEL/INDEX.png and return `root`."""
    for i, (image, label) in enumerate(zip(*make_shapes(num_samples, seed=7), strict=True)):
        path = root / f"class-{label}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root
