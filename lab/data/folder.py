"""A folder of pictures as a data set: CLASS/*, or {train,val,test}/CLASS/*."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision import io
from torchvision.transforms.v2 import functional as F

from lab.data.sources import Parts, Split
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data import DataConfig

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class ImageFiles:
    """Pictures in files, decoded when indexed. Behaves as a uint8 tensor [N, 3, size, size]."""

    paths: tuple[str, ...]
    size: int

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.paths), 3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The pictures at `index`, int64 [n], as uint8 [n, 3, size, size]."""
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        for image, i in zip(images, index.tolist(), strict=True):
            image.copy_(decode(self.paths[i], self.size))
        return images

    def take(self, index: Tensor) -> ImageFiles:
        return ImageFiles(tuple(self.paths[i] for i in index.tolist()), self.size)

    def decode_all(self, num_threads: int) -> Tensor:
        """All pictures, uint8 [N, 3, size, size]. Threads, as decoding holds no Python lock."""
        images = torch.empty(self.shape, dtype=torch.uint8)

        def fill(start: int) -> None:
            for i in range(start, min(start + 64, len(self.paths))):
                images[i] = decode(self.paths[i], self.size)

        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(fill, range(0, len(self.paths), 64)):
                pass
        return images


def decode(path: str, size: int) -> Tensor:
    """One picture as uint8 [3, size, size]: the shorter side resized to `size`, then the centre.

    torchvision's native decoders, which turn the picture as its EXIF orientation says; Pillow for
    what they do not read (BMP, 16-bit PNG, CMYK). Raises `UserError` that names a damaged file.
    """
    try:
        image = io.decode_image(io.read_file(path), "RGB", apply_exif_orientation=True)
        if image.dtype != torch.uint8:
            raise RuntimeError("more than 8 bits a channel")
    except RuntimeError:
        image = _decode_with_pillow(path)
    if image.shape[1:] == (size, size):
        return image
    image = F.resize(image, [size], antialias=True)
    return F.center_crop(image, [size, size])


def _decode_with_pillow(path: str) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits: scaled, as a conversion to RGB would clip
                image = image.convert("I").point(lambda v: v / 256, "L")
            return F.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(
            f"cannot read the picture {path} ({error})", "Replace or delete that file"
        ) from error


def read_folder(config: DataConfig) -> Parts:
    """The splits of a folder: its `train`, `val` and `test` where it has a `train`; else one.

    Class names are the sorted folder names. Raises `UserError` for a missing folder, an empty
    class, fewer than two classes, and a class in `val` or `test` that `train` lacks.
    """
    root = Path(config.data_dir)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}", "Give --data-dir a folder of CLASS/pictures")
    train_root = root / "train" if (root / "train").is_dir() else root
    class_names = tuple(_class_folders(train_root))
    if len(class_names) < 2:
        raise UserError(
            f"{train_root} holds {len(class_names) or 'no'} class folder{'s'[: not class_names]}",
            "Two or more are needed, each with the pictures of one class",
        )
    parts = {"train": _list_split(train_root, class_names, config.image_size)}
    if train_root != root:
        for name in ("val", "test"):
            if (root / name).is_dir():
                parts[name] = _list_split(root / name, class_names, config.image_size)
    return Parts(**parts)


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_split(root: Path, class_names: tuple[str, ...], size: int) -> Split:
    strangers = set(_class_folders(root)) - set(class_names)
    if strangers:
        raise UserError(
            f"{root} has classes that are not trained on: {', '.join(sorted(strangers))}",
            "Every split needs the same class folders",
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(root / name, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not found:
            raise UserError(
                f"the class folder {root / name} holds no pictures",
                f"Add some ({', '.join(SUFFIXES)}) or delete the folder",
            )
        paths += found
        labels += [label] * len(found)
    return Split(ImageFiles(tuple(paths), size), torch.tensor(labels), class_names)
