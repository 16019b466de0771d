"""loss_sum: the cross-entropy that is minimised, of plain batches and of mixed ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config import TrainConfig


def heavier(labels: Tensor, partners: Tensor | None, share: float | Tensor) -> Tensor:
    """Of each sample the label with the larger share, int64 [n]."""
    if partners is None:
        return labels
    if isinstance(share, Tensor):  # which the host cannot look at without waiting
        return torch.where(share >= 0.5, labels, partners)
    return labels if share >= 0.5 else partners


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    partners: Tensor | None,
    share: float | Tensor,
    config: TrainConfig,
) -> Tensor:
    """The sum of the samples' cross-entropies; of mixed ones, that of both labels by `share`."""

    def with_labels(labels: Tensor) -> Tensor:
        smoothing = config.label_smoothing
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    if partners is None:
        return with_labels(labels)
    return share * with_labels(labels) + (1 - share) * with_labels(partners)
