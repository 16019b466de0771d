"""Two data sets that need no download: bundled handwritten digits, and shapes drawn on demand.

Digits (1,797 grey 8x8 images) train in seconds. Shapes (RGB 32x32, as many as wanted) are harder:
position, size, angle, colours and clutter vary, and the shape may be lighter or darker than what is
behind it, so that no weighted sum of pixels tells the classes apart (logistic regression on 5,000
images: test accuracy 0.14). A small convolutional network does (LeNet-5 with ReLU, 12 epochs of
10,000 images: 0.90).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lab.data.types import RawSplits, Split

if TYPE_CHECKING:
    from lab.data import DataConfig


def read_shapes(config: DataConfig) -> RawSplits:
    """Procedural pictures: `num_samples` to train on and a fifth as many to test on."""
    train, test = (
        Split(*make_shapes(n, 2 * config.split_seed + i), SHAPE_NAMES)
        for i, n in enumerate((config.num_samples, max(1, config.num_samples // 5)))
    )
    return RawSplits(train, test=test)


SHAPE_NAMES = (
    "circle",
    "ring",
    "square",
    "frame",
    "triangle",
    "star",
    "cross",
    "crescent",
    "bar",
    "corner",
)
SHAPE_IMAGE_SIZE = 32  # pixels a side
CHUNK = 500  # images drawn at once, a multiple of the number of classes; part of the data set
NUM_DOTS = 3  # distractors an image


def make_shapes(num_samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] (indices into SHAPE_NAMES) of drawn shapes.

    Sample i depends on (seed, i) alone: a shorter set is the beginning of a longer one. Labels go
    round (i modulo 10), so that class counts differ by one at most. Splits take different seeds.

    Raises ValueError when num_samples is below 1 or seed is not in [0, 2**64).
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}. Ask for at least 1.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}. Choose an integer from 0 to 2**64 - 1.")
    images = np.empty((num_samples, 3, SHAPE_IMAGE_SIZE, SHAPE_IMAGE_SIZE), dtype=np.uint8)
    for start in range(0, num_samples, CHUNK):
        part = images[start : start + CHUNK]
        part[:] = _draw_chunk(seed, start // CHUNK)[: len(part)]
    return torch.from_numpy(images), torch.arange(num_samples) % len(SHAPE_NAMES)


def _draw_chunk(seed: int, chunk: int) -> np.ndarray:
    """Images uint8 [CHUNK, 3, 32, 32]: samples CHUNK * chunk onwards."""
    # NumPy promises that Philox's raw output never changes; of Generator's methods it does not.
    philox = np.random.Philox(key=np.array([seed, chunk], dtype=np.uint64))

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        """Float32 in [low, high), [CHUNK, *shape, 1, 1] to broadcast over pixels."""
        raw = philox.random_raw((CHUNK, *shape, 1, 1))
        return (low + (high - low) * ((raw >> np.uint64(40)) * 2.0**-24)).astype(np.float32)

    # Pixel centres, in pixels from the middle of the image.
    axis = np.arange(SHAPE_IMAGE_SIZE, dtype=np.float32) - np.float32((SHAPE_IMAGE_SIZE - 1) / 2)
    grid_x, grid_y = axis[None, None, :], axis[None, :, None]

    radius = uniform(7, 12)  # pixels; every shape lies within this circle
    reach = SHAPE_IMAGE_SIZE / 2 - 1 - radius
    x = grid_x - reach * uniform(-1, 1)
    y = grid_y - reach * uniform(-1, 1)
    cos, sin = _cos_sin(uniform(0, 2 * np.pi))
    u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius

    distance = np.empty((CHUNK, SHAPE_IMAGE_SIZE, SHAPE_IMAGE_SIZE), dtype=np.float32)
    for label, name in enumerate(SHAPE_NAMES):
        same = slice(label, None, len(SHAPE_NAMES))
        distance[same] = _signed_distance(name, u[same], v[same])
    coverage = _coverage(distance * radius)[:, None]  # [CHUNK, 1, 32, 32]

    background = uniform(0, 1, 3)
    # Going round the range by 0.3 to 0.7 keeps every channel 0.3 apart, as often darker as lighter.
    foreground = (background + uniform(0.3, 0.7, 3)) % 1
    dot_colour = uniform(0, 1, NUM_DOTS, 3)

    # Stripes: a triangle wave in a random direction, at times so wide that it is a gradient.
    cos, sin = _cos_sin(uniform(0, 2 * np.pi))
    phase = (cos * grid_x + sin * grid_y) / uniform(6, 40) + uniform(0, 1)
    stripes = uniform(0, 0.4) * (np.abs(phase - np.floor(phase) - 0.5) - 0.25)

    picture = background + stripes[:, None]
    dot_x, dot_y = uniform(-15, 15, NUM_DOTS), uniform(-15, 15, NUM_DOTS)
    dot_radius = uniform(1, 2.5, NUM_DOTS)
    for dot in range(NUM_DOTS):  # behind the shape, whose outline stays whole
        to_centre = _length(grid_x - dot_x[:, dot], grid_y - dot_y[:, dot])
        covered = _coverage(to_centre - dot_radius[:, dot])[:, None]
        picture += covered * (dot_colour[:, dot] - picture)
    picture += coverage * (foreground - picture)

    # Eight noise values from each raw number, in the same byte order on every processor.
    noise = philox.random_raw(picture.size // 8).astype("<u8").view(np.uint8)
    noise = noise.reshape(picture.shape) * np.float32(1 / 255) - np.float32(0.5)
    picture += uniform(0.02, 0.25)[:, None] * noise
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _signed_distance(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of shape `name`, negative inside, [n, 32, 32].

    x, y: [n, 32, 32], like the distance in units of the shape's radius, 0 at its middle.
    Cutting and joining with max and min is inexact near some corners, too little to be seen.
    """
    if name == "circle":
        return _length(x, y) - 0.85
    if name == "ring":
        return np.abs(_length(x, y) - 0.72) - 0.2
    if name == "square":
        return _box(x, y, 0.7, 0.7)
    if name == "frame":
        return np.maximum(_box(x, y, 0.7, 0.7), -_box(x, y, 0.38, 0.38))
    if name == "triangle":
        return _sides(x, y, 3).max(axis=0) - 0.5
    if name == "star":  # what lies beyond one side of a pentagon at most: it and its five tips
        return np.partition(_sides(x, y, 5), 3, axis=0)[3] - np.float32(np.cos(0.4 * np.pi))
    if name == "cross":
        return np.minimum(_box(x, y, 0.95, 0.24), _box(x, y, 0.24, 0.95))
    if name == "crescent":
        return np.maximum(_length(x, y) - 0.95, 0.72 - _length(x - 0.5, y))
    if name == "bar":
        return _box(x, y, 0.95, 0.25)
    assert name == "corner", name
    return np.minimum(_box(x + 0.46, y, 0.22, 0.7), _box(x, y + 0.46, 0.7, 0.22))


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _sides(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """How far out a point lies towards each side of a regular polygon, [count, n, 32, 32]."""
    cos, sin = _cos_sin(np.arange(count) * (2 * np.pi / count))
    return np.stack([c * x + s * y for c, s in zip(cos, sin, strict=True)])


def _cos_sin(angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float32, from float64: rounding hides last-digit differences between processors."""
    angle = np.asarray(angle, dtype=np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _coverage(distance: np.ndarray) -> np.ndarray:
    """The part of each pixel inside, 0 to 1, from its centre's signed distance in pixels."""
    return np.clip(np.float32(0.5) - distance, 0, 1)
