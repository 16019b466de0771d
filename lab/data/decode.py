"""Decode image files to uint8 tensors: one at a time, or a whole split in worker processes."""

from __future__ import annotations

import base64
import io
import os
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache as cache_result
from typing import Any, Self

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lab import console
from lab.data import cache
from lab.data.transforms import EvalTransform, SampleTransform
from lab.data.types import LazyImages, Paths, UnreadableImages
from lab.data.workers import BatchReader
from lab.errors import UserError

# Files are opened in these formats only, whatever their names are. Pillow supports others, but EPS,
# for example, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 100_000_000  # a file of a few kB may declare billions of pixels
REDUCED = 2  # a JPEG decoded at a reduced scale has sides of at least `REDUCED * size` pixels
REFERENCE = base64.b64decode(  # a JPEG of 16 x 16 pixels, for `describe_decoder`
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsj"
    "HBYWICwgIyYnKSopGR8tMC0oMCUoKSj/2wBDAQcHBwoIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgo"
    "KCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/wAARCAAQABADASIAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAA"
    "BQQG/8QAIBAAAgEEAgMBAAAAAAAAAAAAAQIRAAQFIRIxQVHwkf/EABUBAQEAAAAAAAAAAAAAAAAAAAME/8QAGhEA"
    "AgIDAAAAAAAAAAAAAAAAABEEBQYiQf/aAAwDAQACEQMRAD8AEsscFVEWSSIMCTHoCn7LH8CV9QAAZ6Pn7zV9jYwQ"
    "UUM2lk6gzWgx2NYRygr1Krs6+/atu8nT2Dh1q4f/2Q=="
)


@dataclass(frozen=True)
class FileImages(LazyImages):
    """Images in files, decoded when they are indexed."""

    paths: Sequence[str]
    transform: EvalTransform
    stats: Tensor | None = field(default=None, compare=False)  # of `stat_files`, if they are known

    @classmethod
    def create(cls, paths: Sequence[str], stats: Tensor, config: Any) -> Self:
        """Return the images in `paths`, resized as `config`, a `DataConfig`, says."""
        return cls(Paths.of(paths), EvalTransform.of(config), stats)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", Paths.of(self.paths))

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.paths), 3, self.transform.size, self.transform.size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images at `index`, int64 [n], as uint8 [n, 3, size, size].

        Raises `UnreadableImages` if some of them cannot be decoded.
        """
        images, reasons = self._decode(index)
        self._check(reasons)
        return images

    def augment(self, index: Tensor, transform: SampleTransform) -> Tensor:
        """Return the images after `transform`, which crops and resizes, uint8 [n, 3, size, size].

        `index` is int64 [n, 2], the position and the random bits of each image. Raises
        `UnreadableImages` if some of them cannot be decoded.
        """
        images, reasons = [], {}
        for i, bits in index.tolist():
            try:
                images.append(transform(self.decode(i, transform.decode_size), bits))
            except UserError as error:
                reasons[i] = error.what
        self._check(reasons)
        return torch.stack(images)

    def select(self, index: Tensor) -> Self:
        stats = None if self.stats is None else self.stats[index]
        return replace(self, paths=Paths.of(self.paths)[index.numpy()], stats=stats)

    def join(self, others: Sequence[Self]) -> Self:
        """Return the concatenation of several sets of images."""
        sets = (self, *others)
        paths = Paths(path for files in sets for path in files.paths)
        return replace(self, paths=paths, stats=torch.cat([s.file_stats() for s in sets]))

    def read(self, i: int, offset: int = 0, num_bytes: int = -1) -> bytes:
        """Return the content of a file from `offset` on, or its next `num_bytes`."""
        return read_file(self.paths[i], offset, num_bytes)

    def decode(self, i: int, size: int = 0) -> Tensor:
        """Return the image at position `i` as `decode` does."""
        return decode(self.paths[i], size)

    def file_stats(self) -> Tensor:
        """Return the result of `stat_files`, int64 [N, 3]."""
        return cache.stat_files(self.paths) if self.stats is None else self.stats

    def key(self, transform: Any, change_time: bool = False) -> str:
        """Return the result of `cache.key_of` for these images."""
        return cache.key_of(self.paths, self.file_stats(), transform, change_time)

    def decode_all(self, num_workers: int, use_cache: bool | None = None) -> Tensor:
        """Return all images, uint8 [N, 3, size, size], decoded or from the cache.

        By default, the cache is used for at least `cache.MIN_IMAGES` images. Raises
        `UnreadableImages`, which lists all images that cannot be decoded.
        """
        if use_cache is None:
            use_cache = len(self) >= cache.MIN_IMAGES

        def fill(images: Tensor) -> None:
            if use_cache and (known := cache.load_json(self._unreadable_key())):
                self[torch.tensor([i for i, _ in known])]  # raises if they still are unreadable
            batches = self._batches(num_workers)
            reasons: dict[int, str] = {}
            with in_workers(self._decode, batches, num_workers) as results:
                for index, (decoded, unreadable) in zip(batches, results, strict=True):
                    images[index[0] : index[-1] + 1] = decoded
                    reasons |= unreadable
            if reasons and use_cache:
                cache.store_json(self._unreadable_key(), [*reasons.items()])
            self._check(reasons)

        if use_cache:
            return cache.cached(self._key(), self.shape, fill)
        images = torch.empty(tuple(self.shape), dtype=torch.uint8)
        fill(images)
        return images

    def unreadable(self, num_workers: int) -> dict[int, str]:
        """Return the error message of each image that cannot be decoded, by position.

        All images are decoded once per host: the result is cached until a file changes.
        """

        def check() -> list[tuple[int, str]]:
            with in_workers(self._reasons, self._batches(num_workers), num_workers) as results:
                return [item for reasons in results for item in reasons.items()]

        return dict(cache.cached_json(self._unreadable_key(), check))

    def _key(self, change_time: bool = False) -> str:
        return self.key(self.transform, change_time)

    def _unreadable_key(self) -> str:
        return f"{self._key(change_time=True)}-unreadable"

    def _check(self, reasons: Mapping[int, str]) -> None:
        """Raise `UnreadableImages` if there are images that cannot be decoded."""
        if reasons:
            raise UnreadableImages({self.paths[i]: reason for i, reason in reasons.items()})

    def _batches(self, num_workers: int) -> Sequence[Tensor]:
        # Batches of at most 2 MB, as they are sent between processes.
        most = 2**21 // (3 * self.transform.size**2)
        return worker_batches(len(self), num_workers, most)

    def _decode(self, index: Tensor) -> tuple[Tensor, dict[int, str]]:
        """Return the images at `index`, and the errors of those that cannot be decoded."""
        images = torch.zeros(len(index), *self.shape[1:], dtype=torch.uint8)
        reasons = {}
        for image, i in zip(images, index.tolist(), strict=True):
            try:
                image.copy_(self.transform(self.decode(i, self.transform.decode_size)))
            except UserError as error:
                reasons[i] = error.what
        return images, reasons

    def _reasons(self, index: Tensor) -> dict[int, str]:
        return self._decode(index)[1]


def worker_batches(num_images: int, num_workers: int, most: int = 64) -> Sequence[Tensor]:
    """Return the positions of all images in batches of at most `most`, several for each worker."""
    size = min(most, num_images // (8 * max(1, num_workers)))
    return torch.arange(num_images).split(max(1, size))


@contextmanager
def in_workers(
    function: Callable[[Tensor], Any], batches: Sequence[Tensor], num_workers: int
) -> Iterator[Iterator[Any]]:
    """Yield an iterator of `function(batch)` for each batch, computed by worker processes.

    Threads would hardly run in parallel, because most of the time for small images is spent in
    Python code.
    """
    num_workers = min(num_workers, len(batches)) if num_workers > 1 else 0
    with BatchReader(function, num_workers, fallback="--threads 1") as reader:
        yield reader.read(batches)


def decode(path: str, size: int = 0) -> Tensor:
    """Return an image as uint8 [3, H, W], in its EXIF orientation.

    `size` is the number of pixels that the image will be resized to; 0 if it is unknown. A large
    JPEG is decoded at 1/2, 1/4 or 1/8 of its scale, so that its sides have at least
    `REDUCED * size` pixels. Transparency is dropped, and only the first image of an animation is
    decoded. Raises `UserError` if the file is damaged, not an image, or has more than `MAX_PIXELS`.
    """
    return decode_content(path, lambda: read_file(path), size)


def decode_content(name: str, read: Callable[[], bytes], size: int) -> Tensor:
    """Return the image whose content `read` returns as `decode` does; errors contain `name`."""
    try:
        return _decode(read(), size)
    except Exception as error:  # Pillow's decoders raise exceptions of many types
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "unknown format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"more than {MAX_PIXELS // 10**6} million pixels"
        raise UserError(
            f"cannot read the image {name} ({reason})", "Replace or delete the file"
        ) from error


def read_file(path: str, offset: int = 0, num_bytes: int = -1) -> bytes:
    """Return the content of a regular file from `offset` on, or its next `num_bytes`."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would block
        raise ValueError("not a regular file")
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(num_bytes)


def _decode(content: bytes, size: int) -> Tensor:
    """Return the image in a file's content as uint8 [3, H, W], in its EXIF orientation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; they do not name the file
        # `open` reads only the header.
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if size:  # affects JPEG only, whose inverse cosine transform can give fewer pixels
                image.draft(None, (REDUCED * size, REDUCED * size))
            return pixels(image)


@cache_result
def describe_decoder() -> str:
    """Return the version of Pillow, and a checksum of a JPEG that was decoded and resized.

    The checksum changes if another version of Pillow or PyTorch gives other pixels.
    """
    image = EvalTransform(4)(_decode(REFERENCE, 4))
    return f"Pillow {PIL.__version__}, pixels {zlib.crc32(image.numpy().tobytes()):08x}"


def warn_of_other_pixels(trained: str) -> None:
    """Warn if files are decoded to other pixels than in training.

    `trained` is the result of `describe_decoder` in training.
    """
    current = describe_decoder()
    if trained.split()[-1:] != current.split()[-1:]:
        console.warn(
            f"image files are decoded to other pixels than in training ({current}; in training "
            f"{trained}): predictions may differ slightly"
        )


def pixels(image: Image.Image) -> Tensor:
    """Return a Pillow image of any mode as uint8 [3, H, W], in its EXIF orientation."""
    image.load()  # raises if the file is damaged
    with suppress(Exception):  # damaged metadata; Pillow raises exceptions of many types
        # Like `convert` below, it would copy an image that does not change.
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: scale it, because a conversion to RGB would clip it
        image = image.convert("I").point(lambda v: v / 256, "L")
    image = image if image.mode == "RGB" else image.convert("RGB")  # convert would copy it
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
