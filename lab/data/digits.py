"""The bundled dataset of handwritten digits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lab.data import DataConfig
from lab.data.types import RawSplits, Split


def read_digits(config: DataConfig) -> RawSplits:
    """Return the 1,797 handwritten digits of UCI, 8 x 8 pixels."""
    images, labels = load_digits()
    return RawSplits(Split(images, labels, tuple("0123456789")))


DIGITS_FILE = Path(__file__).with_name("digits.safetensors")


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, uint8 [1797, 1, 8, 8], and labels, int64 [1797] from 0 to 9.

    The source's gray levels 0 to 16 are stored as round(level * 255 / 16), in the order of
    scikit-learn's `load_digits`.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (its test part),
    UCI Machine Learning Repository, 1998, doi 10.24432/C50P49, license CC BY 4.0.
    """
    tensors = load_file(DIGITS_FILE)
    return tensors["images"], tensors["labels"].long()
