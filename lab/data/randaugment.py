"""The operations of RandAugment on whole batches, the same bits on every device (promise P2).

Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space".
Operations and strengths are those of torchvision.transforms.v2.RandAugment at its defaults,
magnitude 9 of 30. Four of its kernels are used. The others multiply and add in floating point,
which devices round differently (a matrix product in TF32 among them), and then cut to whole grey
levels: here what is cut is never near a whole number, whichever way it was rounded.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

NUM_OPERATIONS = 2  # a picture: the paper's N for ImageNet, with its M of 9
STRENGTH = 9 / 30
SHEAR = 0.3 * STRENGTH
TRANSLATION = 150 / 331 * STRENGTH  # of the side
ROTATION = math.radians(30 * STRENGTH)
BLEND = 0.9 * STRENGTH
POSTERIZE_BITS = round(8 - 4 * STRENGTH)
SOLARIZE_FROM = 255 * (1 - STRENGTH)
UNIT = 2**16  # 1 in fixed point


def apply(images: Tensor, operations: Tensor, signs: Tensor) -> Tensor:
    """Images uint8 [n, C, H, W], C 1 or 3, each changed by its operation.

    `operations` are numbers in OPERATIONS, `signs` 0 or 1: towards less or more; int64 [n] each.
    """
    images = images.clone()
    drawn = operations.tolist()  # the one wait for the device
    for number, change in enumerate(OPERATIONS.values()):
        members = [i for i, drawn_number in enumerate(drawn) if drawn_number == number]
        if members and change:
            group = torch.tensor(members, device=images.device)
            images[group] = change(images[group], 2 * signs[group] - 1)
    return images


def geometry(images: Tensor, signs: Tensor, kind: str) -> Tensor:
    """Images sheared, translated or rotated by the nearest pixel; what comes in is black."""
    (height, width), device = images.shape[2:], images.device
    # A matrix for each sign; -1 indexes the last.
    table = torch.tensor([_matrix(kind, sign, height, width) for sign in (0, 1, -1)])
    a, b, c, d, e, f = table.to(device).T[:, :, None, None]
    x = 2 * torch.arange(width, device=device) + 1  # centres, in halves of a pixel
    y = 2 * torch.arange(height, device=device)[:, None] + 1
    column, row = (a * x + b * y + c) // (2 * UNIT), (d * x + e * y + f) // (2 * UNIT)  # [3, H, W]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    flat = images.flatten(2)
    moved = flat.gather(2, source.flatten(1)[signs][:, None].expand_as(flat)).view_as(images)
    return moved * inside[signs][:, None]


def _matrix(kind: str, sign: int, height: int, width: int) -> tuple[int, ...]:
    """(a, b, c, d, e, f), fixed point: of x, y and 1 in halves of a pixel, for columns and rows."""
    one, shear = UNIT, round(sign * SHEAR * UNIT)
    if kind == "rotate":  # about the centre
        cos, sin = round(math.cos(ROTATION) * UNIT), round(sign * math.sin(ROTATION) * UNIT)
        c = (UNIT - cos) * width + sin * height
        f = (UNIT - cos) * height - sin * width
        return cos, -sin, c, sin, cos, f
    return {
        "shear-x": (one, shear, 0, 0, one, 0),
        "shear-y": (one, 0, 0, shear, one, 0),
        "translate-x": (one, 0, -2 * sign * int(TRANSLATION * width) * UNIT, 0, one, 0),
        "translate-y": (one, 0, 0, 0, one, -2 * sign * int(TRANSLATION * height) * UNIT),
    }[kind]


def blend(images: Tensor, others: Tensor | float, signs: Tensor) -> Tensor:
    """Images less or more unlike `others`, float32 of whole numbers; cut to 0 ... 255."""
    factor = (1 + BLEND * signs)[:, None, None, None]
    # A multiple of a hundredth, and half of one: no rounding reaches a whole number from there.
    return ((images - others) * factor + others + 0.005).clamp(0, 255).byte()


def brightness(images: Tensor, signs: Tensor) -> Tensor:
    """Images darker or brighter."""
    return blend(images.float(), 0.0, signs)


def color(images: Tensor, signs: Tensor) -> Tensor:
    """Images paler or more colourful."""
    return blend(images.float(), _grey(images), signs)


def contrast(images: Tensor, signs: Tensor) -> Tensor:
    """Images nearer to or farther from their mean grey."""
    num_pixels = images.shape[2] * images.shape[3]
    total = _grey(images).long().sum((1, 2, 3), keepdim=True)
    return blend(images.float(), ((total + num_pixels // 2) // num_pixels).float(), signs)


def sharpness(images: Tensor, signs: Tensor) -> Tensor:
    """Images smoother or sharper; the outermost pixels stay."""
    inner = (..., slice(1, -1), slice(1, -1))
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[inner]
    changed = images.clone()
    changed[inner] = blend(pixels[inner], ((total + 6.5) / 13).floor(), signs)
    return changed


def _grey(images: Tensor) -> Tensor:
    """Luma, float32 [n, 1, H, W] of whole numbers (ITU-R BT.601)."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, 1)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 0.0005).floor()


Operation = Callable[[Tensor, Tensor], Tensor]
OPERATIONS: dict[str, Operation | None] = {
    "identity": None,
    "shear-x": partial(geometry, kind="shear-x"),
    "shear-y": partial(geometry, kind="shear-y"),
    "translate-x": partial(geometry, kind="translate-x"),
    "translate-y": partial(geometry, kind="translate-y"),
    "rotate": partial(geometry, kind="rotate"),
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": lambda images, _: F.posterize(images, POSTERIZE_BITS),
    "solarize": lambda images, _: F.solarize(images, SOLARIZE_FROM),
    "autocontrast": lambda images, _: F.autocontrast(images),
    "equalize": lambda images, _: F.equalize(images),
}
