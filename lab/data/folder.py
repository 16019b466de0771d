"""A folder of pictures as a data set: CLASS/*, or {train,val,test}/CLASS/*."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lab import console
from lab.data.cache import cached
from lab.data.sources import Parts, Split
from lab.data.workers import BatchReader
from lab.errors import UserError

try:
    from torchvision.io import decode_jpeg
except ImportError:  # deprecated in torchvision 0.29: Pillow reads on without it
    decode_jpeg = None

if TYPE_CHECKING:
    from lab.data import DataConfig

VALIDATION = ("val", "valid", "validation")  # any of these names
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
        if not len(index):
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        return torch.stack([decode(self.paths[i], self.size) for i in index.tolist()])

    def take(self, index: Tensor) -> ImageFiles:
        return ImageFiles(tuple(self.paths[i] for i in index.tolist()), self.size)

    def decode_all(self, num_workers: int) -> Tensor:
        """All pictures, uint8 [N, 3, size, size]; the second time, from the cache on disk."""
        # Of about 2 MB, as each is sent from a process; fewer, so that all have their share.
        num_pictures = min(2**21 // (3 * self.size**2), len(self) // (8 * num_workers))
        batches = torch.arange(len(self)).split(max(1, num_pictures))

        def fill(images: Tensor) -> None:
            # Processes: for small pictures, threads would wait for each other's Python.
            reader = BatchReader(
                self,
                batches,
                min(num_workers, len(batches)) if num_workers > 1 else 0,
                batch_nbytes=len(batches[0]) * 3 * self.size**2,
                options_without_workers="--loader streaming --workers 0",
            )
            mistakes: dict[str, UserError] = {}
            with reader:
                for index, decoded in zip(batches, reader, strict=True):
                    if isinstance(decoded, UserError):
                        mistakes |= self._mistakes(index) or {self.paths[index[0]]: decoded}
                    else:
                        images[index[0] : index[-1] + 1] = decoded
            if len(mistakes) > 1:  # all at once: a folder with one damaged file may have more
                names = ", ".join(list(mistakes)[:3])
                more = f" and {len(mistakes) - 3} more" if len(mistakes) > 3 else ""
                raise UserError(
                    f"cannot read {len(mistakes)} pictures: {names}{more}",
                    "Replace or delete those files",
                )
            for mistake in mistakes.values():
                raise mistake

        return cached(self, fill)

    def _mistakes(self, index: Tensor) -> dict[str, UserError]:
        """What is wrong with those of the pictures at `index` that cannot be read, by path."""
        found = {}
        for path in (self.paths[i] for i in index.tolist()):
            try:
                decode(path, self.size)
            except UserError as mistake:
                found[path] = mistake
        return found


def decode(path: str, size: int) -> Tensor:
    """One picture as uint8 [3, size, size]: its central square, turned as its EXIF data says.

    Transparency is dropped; of an animation it is the first picture. Raises `UserError` that names
    a file that is damaged or no picture.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            content = file.read()
        image = _decode_with_pillow(content) if (jpeg := _decode_jpeg(content)) is None else jpeg
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "in no known format"
        raise UserError(
            f"cannot read the picture {path} ({reason})", "Replace or delete that file"
        ) from error
    return square(image, size)


def square(images: Tensor, size: int) -> Tensor:
    """The central squares [..., C, size, size] of uint8 [..., C, H, W]."""
    if images.shape[-2:] == (size, size):
        return images
    # Cut before it is resized: a strip of 1 x 5000 pixels would first become a huge one.
    images = F.center_crop(images, [min(images.shape[-2:])])
    return F.resize(images, [size, size], antialias=True)


def grey(images: Tensor) -> Tensor:
    """uint8 [..., 1, H, W] of uint8 [..., 3, H, W]; what is grey already keeps its values.

    torchvision's weights add up to 0.9999, and of uint8 it cuts the fraction off: 255 became 254.
    """
    return F.rgb_to_grayscale(images.float()).round().byte()


def _decode_jpeg(content: bytes) -> Tensor | None:
    """A JPEG by torchvision, faster than by Pillow; None for what it cannot read.

    Its PNG decoder is left alone: on some damaged files it ends the process with a segmentation
    fault (0.29). Its WebP decoder knows no EXIF orientation.
    """
    if decode_jpeg is None or not content.startswith(b"\xff\xd8\xff"):
        return None
    try:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_jpeg(data, "RGB", apply_exif_orientation=True)
    except RuntimeError:
        return None


def _decode_with_pillow(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as file:
        return pixels(file)


def pixels(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as uint8 [3, H, W], turned as its EXIF data says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: scaled, as a conversion to RGB would clip
        image = image.convert("I").point(lambda v: v / 256, "L")
    return F.pil_to_tensor(image.convert("RGB"))


def read_folder(config: DataConfig) -> Parts:
    """The splits of a folder: its `train`, `val` and `test` where it has a `train`; else one.

    Class names are the sorted folder names; names that begin with a dot are passed over. Raises
    `UserError` for a missing folder, an empty class, fewer than two classes, and classes of `val`
    or `test` that are not those of `train`.
    """
    root = Path(config.data_dir)
    if not os.path.isdir(root):  # Path.is_dir raises for a name that is too long
        raise UserError(f"there is no folder {root}", "Give --data-dir a folder of CLASS/pictures")
    train_root = root / "train" if (root / "train").is_dir() else root
    class_names = tuple(_class_folders(train_root))
    if train_root == root and {"test", *VALIDATION} & set(class_names):
        raise UserError(
            f"{root} has no folder train beside val or test", "Name the folder to train on train"
        )
    if len(class_names) < 2:
        raise UserError(
            f"{train_root} holds {len(class_names) or 'no'} class folder{'s'[: not class_names]}",
            "Two or more are needed, each with the pictures of one class",
        )

    others: list[str] = []

    def list_split(folder: Path) -> Split:
        split = _list_split(folder, class_names, config.image_size, others)
        return replace(split, root=str(root))

    parts = {"train": list_split(train_root)}
    if train_root != root:
        for name, folders in (("val", VALIDATION), ("test", ("test",))):
            found = [root / folder for folder in folders if (root / folder).is_dir()]
            if len(found) > 1:
                raise UserError(
                    f"{root} has both {found[0].name} and {found[1].name}", "Keep one of them"
                )
            if found:
                parts[name] = list_split(found[0])
    beside = [
        str(path)
        for path in train_root.iterdir()
        if path.name.lower().endswith(SUFFIXES) and path.name[0] != "." and path.is_file()
    ]
    if beside:
        console.warn(f"{len(beside)} pictures are left out, as {min(beside)}: in no class folder")
    if others:
        console.warn(
            f"{len(others)} of the files in class folders are left out, as {min(others)}: "
            f"not {', '.join(SUFFIXES)}"
        )
    return Parts(**parts)


def _class_folders(root: Path) -> list[str]:
    try:
        return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"cannot read the folder {root} ({error.strerror})", "Mend its permissions"
        ) from error


def _list_split(root: Path, class_names: tuple[str, ...], size: int, others: list[str]) -> Split:
    found_names = set(_class_folders(root))
    for problem, names in (
        ("has classes that are not trained on", found_names - set(class_names)),
        ("lacks classes that are trained on", set(class_names) - found_names),
    ):
        if names:
            raise UserError(
                f"{root} {problem}: {', '.join(sorted(names))}",
                "Every split needs the same class folders",
            )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(pictures(root / name, others))
        if not found:
            raise UserError(
                f"the class folder {root / name} holds no pictures",
                f"Add some ({', '.join(SUFFIXES)}) or delete the folder",
            )
        paths += found
        labels += [label] * len(found)
    files = ImageFiles(tuple(paths), size)
    return Split(files, torch.tensor(labels), class_names, files.paths)


def pictures(root: Path, others: list[str] | None = None) -> Iterator[str]:
    """The paths of the pictures at any depth below a folder; hidden ones are passed over.

    Files of other types are added to `others`, but for those that file managers leave.
    """
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back up would list all again
            folders.clear()
            continue
        seen.add(real)
        # Editors keep copies of pictures in hidden folders. In place: os.walk then skips them.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                yield os.path.join(folder, name)
            elif others is not None and name.lower() not in ("thumbs.db", "desktop.ini"):
                others.append(os.path.join(folder, name))
