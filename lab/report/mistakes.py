"""keep: the few pictures of its data that a run keeps, so that it can be looked at later."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.checkpoint.atomic_io import write_atomically
from lab.checkpoint.run_dir import IMAGES, RunDir
from lab.data import Splits
from lab.data.sampler import ShardedBatchSampler, random_bits
from lab.data.transforms import BatchTransform
from lab.data.types import Split

if TYPE_CHECKING:
    from lab.config.schema import TrainConfig
    from lab.engine.evaluation import Predictions


SIDE = 64  # pixels; larger pictures are made smaller
BATCH = 64  # pictures of the first training batch
NUM_MOST_CONFIDENT = 24  # the most confident mistakes, whatever their classes
PER_CELL = 12  # mistakes of one cell of the confusion matrix
MISTAKES = 1000  # in all,
MISTAKES_BYTES = 4 * 2**20  # and their pixels


def keep(run: RunDir, config: TrainConfig, splits: Splits, predictions: Predictions) -> None:
    """Writes images.safetensors, on the main process: the first training batch, and mistakes.

    `batch` is uint8 [n, C, H, W], `mistakes` uint8 [m, C, H, W]; each has `_labels` and `_index`,
    int64: the true classes, and the positions in the training and the test split.

    Both are found at the end of a run, as functions of the settings and of what was predicted:
    so a run that was resumed, or trained on several processes, has the same ones.
    """
    if not run.is_main_process:
        return
    images, batch = first_batch(config, splits)
    mistakes = chosen(predictions, _most(splits.test))
    tensors = {
        "batch": images,
        "batch_labels": splits.train.labels[batch],
        "batch_index": batch,
        "mistakes": shrink(splits.test.images[mistakes]),
        "mistakes_labels": splits.test.labels[mistakes],
        "mistakes_index": mistakes,
    }
    content = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    write_atomically(run.path / IMAGES, lambda path: path.write_bytes(content))


def first_batch(config: TrainConfig, splits: Splits) -> tuple[Tensor, Tensor]:
    """The first pictures of the first epoch as the network sees them, augmented and mixed.

    (uint8 [n, C, H, W], their positions in the training split, int64 [n]). They are normalised as
    for the network, and what that does to colours is then undone.
    """
    num_samples = len(splits.train.labels)
    transform = BatchTransform(
        splits.mean, splits.std, config.augmentations, "cpu", config.mixup_alpha
    )
    sampler = ShardedBatchSampler(num_samples, config.batch_size, config.seed, rank=0, world_size=1)
    cut = next(sampler.slices())
    cut = replace(cut, parts=(cut.parts[0][:BATCH],))
    mixup = transform.mixup
    index = sampler.indices(sampler.order(1), cut, mixup is not None)
    bits = random_bits(config.seed, 1, num_samples, "cpu")[index]
    images = transform(splits.train.images[index], bits)
    if mixup is not None:
        images, index = mixup.draw(config.seed, 1, 0, *images.shape[2:])(images), index[1:]
    pixels = (images - transform.shift) / transform.scale
    return shrink(pixels.round().clamp(0, 255).byte()), index


def chosen(predictions: Predictions, most: int) -> Tensor:
    """Positions of the wrong predictions to keep, int64 [m], m <= `most`.

    First the most confident of all. Then each cell of the confusion matrix gets its most confident
    one, then its second ... up to PER_CELL; of two cells, the one that holds more is served first.
    """
    wrong = (predictions.labels != predictions.predictions).nonzero().flatten()
    wrong = wrong[predictions.confidence[wrong].argsort(descending=True, stable=True)]
    num_classes = len(predictions.class_names)
    cells = predictions.labels[wrong] * num_classes + predictions.predictions[wrong]
    by_cell = cells.argsort(stable=True)
    counts = cells.bincount(minlength=num_classes**2)
    first = counts.cumsum(0) - counts  # of each cell, in `by_cell`
    rank = torch.empty_like(cells)  # of each mistake in its cell
    rank[by_cell] = torch.arange(len(cells)) - first[cells[by_cell]]
    # Sorted by rank, then by size of the cell; stable sorts keep the most confident first.
    order = (-counts[cells]).argsort(stable=True)
    order = order[rank[order].argsort(stable=True)]
    order = order[(rank[order] < PER_CELL) & (order >= NUM_MOST_CONFIDENT)]
    return torch.cat((wrong[:NUM_MOST_CONFIDENT], wrong[order]))[:most]


def _most(split: Split) -> int:
    """How many pictures of a split may be kept."""
    in_chans, height, width = split.images.shape[1:]
    size = in_chans * min(SIDE, height) * min(SIDE, width)
    return min(MISTAKES, MISTAKES_BYTES // size)


def shrink(images: Tensor) -> Tensor:
    """uint8 [n, C, H, W], square, of at most SIDE pixels a side."""
    if max(images.shape[-2:]) <= SIDE or not len(images):
        return images
    smaller = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).byte()
