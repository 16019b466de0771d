"""Image files decoded to uint8 tensors: one at a time, or all of a split by worker processes."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lab.data import cache
from lab.data.splits import histogram
from lab.data.workers import BatchReader
from lab.errors import UserError, name_some

try:
    from torchvision.io import decode_jpeg
except ImportError:  # deprecated in torchvision 0.29: Pillow reads on without it
    decode_jpeg = None

# Whatever a file is called, it is opened as one of these. Pillow's other formats are left out:
# EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 100_000_000  # a file of a few kB can claim billions, and their memory
NUM_NAMED = 20  # unreadable files that one message names


class UnreadableImages(UserError):
    """Images that cannot be decoded; `reasons` maps each path to what is wrong with it."""

    def __init__(self, reasons: Mapping[str, str]):
        what, files = next(iter(reasons.values())), "that file"
        if len(reasons) > 1:
            names = name_some([*reasons], NUM_NAMED)
            what, files = f"cannot read {len(reasons)} images: {names}", "those files"
        super().__init__(what, f"Replace or delete {files}, or give --skip-unreadable")
        self.args, self.reasons = (reasons,), reasons  # args: what unpickling calls it with


@dataclass(frozen=True)
class FileImages:
    """Images in files, decoded when indexed. Behaves as a uint8 tensor [N, 3, size, size]."""

    paths: tuple[str, ...]
    size: int

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.paths), 3, self.size, self.size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images at `index`, int64 [n], as uint8 [n, 3, size, size].

        Raises `UnreadableImages` that names all of them that cannot be decoded.
        """
        images, reasons = self._decode(index)
        if reasons:
            raise UnreadableImages(reasons)
        return images

    def select(self, index: Tensor) -> FileImages:
        return FileImages(tuple(self.paths[i] for i in index.tolist()), self.size)

    def join(self, others: Sequence[FileImages]) -> FileImages:
        """Return the images of several sets as one, in the order given."""
        return replace(self, paths=tuple(path for files in (self, *others) for path in files.paths))

    def decode_all(self, num_workers: int, use_cache: bool | None = None) -> Tensor:
        """Return all images, uint8 [N, 3, size, size]; from the second time on, from the cache.

        `use_cache`: whether to use the cache; None: if there are enough images to be worth it.
        Raises `UnreadableImages` that names every image that cannot be decoded.
        """
        if use_cache is None:
            use_cache = len(self) >= cache.FEWEST

        def fill(images: Tensor) -> None:
            key = self._unreadable_key() if use_cache else ""
            if key and (known := cache.load_json(key)):
                # Another process may just have failed: check the files that it named, no others.
                reasons = self._reasons(torch.tensor([i for i, _ in known]))
                if reasons:
                    raise UnreadableImages(reasons)
            reasons = {}
            batches = self._batches(torch.arange(len(self)), num_workers)
            with _in_workers(self._decode_array, batches, num_workers) as results:
                for index, (decoded, unreadable) in zip(batches, results, strict=True):
                    images[index[0] : index[-1] + 1] = torch.from_numpy(decoded)
                    reasons |= unreadable
            if reasons:
                if key:
                    cache.store_json(key, self._positions(reasons))
                raise UnreadableImages(reasons)

        if use_cache:
            return cache.cached(cache.key_of(self.paths, self.size), self.shape, fill)
        images = torch.empty(tuple(self.shape), dtype=torch.uint8)
        fill(images)
        return images

    def histogram(self, index: Tensor, num_workers: int, decoded: Tensor | None = None) -> Tensor:
        """Return how often each value occurs in the images at `index`, int64 [3, 256].

        It is computed once per host and cached. `decoded`: all images, if they are in memory.
        Raises `UnreadableImages`.
        """

        def count() -> list[list[int]]:
            reasons: dict[str, str] = {}
            total = torch.zeros(3, 256, dtype=torch.int64)
            batches = self._batches(index, num_workers)
            if decoded is not None:
                for batch in batches:
                    total += histogram(decoded[batch])
                return total.tolist()
            with _in_workers(self._histogram_array, batches, num_workers) as results:
                for counts, unreadable in results:
                    total += torch.from_numpy(counts)
                    reasons |= unreadable
            if reasons:
                raise UnreadableImages(reasons)
            return total.tolist()

        key = cache.key_of([self.paths[i] for i in index.tolist()], self.size)
        return torch.tensor(cache.cached_json(f"{key}-histogram", count))

    def unreadable(self, num_workers: int) -> dict[int, str]:
        """Return the positions of the images that cannot be decoded, and what is wrong with each.

        All are decoded, once per host: the list is cached until a file changes.
        """

        def check() -> list[tuple[int, str]]:
            batches = self._batches(torch.arange(len(self)), num_workers)
            found: dict[str, str] = {}
            with _in_workers(self._reasons, batches, num_workers) as results:
                for reasons in results:
                    found |= reasons
            return self._positions(found)

        return {int(i): what for i, what in cache.cached_json(self._unreadable_key(), check)}

    def _unreadable_key(self) -> str:
        return cache.key_of(self.paths, self.size, change_time=True) + "-unreadable"

    def _positions(self, reasons: Mapping[str, str]) -> list[tuple[int, str]]:
        return [(i, reasons[path]) for i, path in enumerate(self.paths) if path in reasons]

    def _batches(self, index: Tensor, num_workers: int) -> Sequence[Tensor]:
        # About 2 MB each, as they are sent between processes; fewer so that all have their share.
        num_images = min(2**21 // (3 * self.size**2), len(index) // (8 * max(1, num_workers)))
        return index.split(max(1, num_images))

    def _decode(self, index: Tensor) -> tuple[Tensor, dict[str, str]]:
        """Return the images at `index`, and what is wrong with those that cannot be decoded."""
        images = torch.zeros(len(index), *self.shape[1:], dtype=torch.uint8)
        reasons = {}
        for image, i in zip(images, index.tolist(), strict=True):
            try:
                image.copy_(decode(self.paths[i], self.size))
            except UserError as error:
                reasons[self.paths[i]] = error.what
        return images, reasons

    # What workers get and return contains no tensors: PyTorch would send them through shared
    # memory, which is small in containers.

    def _decode_array(self, index: Tensor) -> tuple[np.ndarray, dict[str, str]]:
        images, reasons = self._decode(index)
        return images.numpy(), reasons

    def _histogram_array(self, index: Tensor) -> tuple[np.ndarray, dict[str, str]]:
        images, reasons = self._decode(index)
        return histogram(images).numpy(), reasons

    def _reasons(self, index: Tensor) -> dict[str, str]:
        return self._decode(index)[1]


class _Calls:
    """Maps the indices of a batch to the result of a function, as worker processes compute it."""

    def __init__(self, function: Callable[[Tensor], Any]):
        self.function = function

    def __getitem__(self, index: list[int]) -> Any:
        return self.function(torch.tensor(index))


def _in_workers(
    function: Callable[[Tensor], Any], batches: Sequence[Tensor], num_workers: int
) -> BatchReader:
    """Return a reader that yields `function(batch)` of each batch, computed by worker processes.

    These are processes because, with small images, threads would wait for each other's Python.
    """
    return BatchReader(
        _Calls(function),
        [batch.tolist() for batch in batches],
        min(num_workers, len(batches)) if num_workers > 1 else 0,
        batch_nbytes=0,
        options_without_workers="--threads 1",
    )


def decode(path: str, size: int) -> Tensor:
    """Return an image as uint8 [3, size, size]: its central square, turned as its EXIF data says.

    Transparency is dropped; of an animation it is the first image. Raises `UserError` that names a
    file that is damaged, no image, or of more than `MAX_PIXELS`.
    """
    try:
        image = _decode(_read(path))
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "in no known format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"more than {MAX_PIXELS // 10**6} million pixels"
        raise UserError(
            f"cannot read the picture {path} ({reason})", "Replace or delete that file"
        ) from error
    return square(image, size)


def _read(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe waits for its other end
        raise ValueError("not a regular file")
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _decode(content: bytes) -> Tensor:
    """Return uint8 [3, H, W] of a file's content, turned as its EXIF data says."""
    header = _read_jpeg_header(content)
    if header is not None:
        num_pixels, exif = header
        _check_size(num_pixels)
        decoded = _decode_jpeg(content)
        if decoded is not None:
            return _turn(decoded, lambda: _parse_exif(exif)) if exif else decoded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata; they name no file
        # This reads the header only.
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image.width * image.height)
            return pixels(image)


def _check_size(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise Image.DecompressionBombError


def _read_jpeg_header(content: bytes) -> tuple[int, bytes] | None:
    """Return (number of pixels, EXIF data) of a JPEG; None for any other file.

    From its segments (ITU-T T.81, annex B). Pillow would take longer than a small image's decoder.
    """
    num_pixels, exif, position = 0, b"", 2
    while content.startswith(b"\xff\xd8\xff") and content[position : position + 1] == b"\xff":
        marker = content[position + 1 : position + 2]
        if marker == b"\xff":  # a fill byte
            position += 1
            continue
        if marker == b"\xda":  # start of scan: the image follows
            return num_pixels, exif
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position + 4 : end]
        if marker in START_OF_FRAME:
            num_pixels = int.from_bytes(segment[1:3], "big") * int.from_bytes(segment[3:5], "big")
        elif marker == b"\xe1" and segment.startswith(b"Exif\0\0"):
            exif += segment[6:]
        position = end
    return None


START_OF_FRAME = {bytes([n]) for n in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}


def _decode_jpeg(content: bytes) -> Tensor | None:
    """Decode a JPEG by torchvision, which is faster than Pillow; None where it cannot.

    Its PNG decoder is left alone: on some damaged files it ends the process with a segmentation
    fault (0.29).
    """
    if decode_jpeg is None:
        return None
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), "RGB")
    except RuntimeError:
        return None


def pixels(image: Image.Image) -> Tensor:
    """Return a Pillow image of any mode as uint8 [3, H, W], turned as its EXIF data says."""
    converted = image
    if image.mode.startswith("I"):  # 16 bits: scaled, as a conversion to RGB would clip
        converted = image.convert("I").point(lambda v: v / 256, "L")
    return _turn(F.pil_to_tensor(converted.convert("RGB")), image.getexif)


# The EXIF orientation, and what undoes it: swap height and width, then flip these dimensions.
TURNS: Mapping[Any, tuple[bool, list[int]]] = {
    2: (False, [-1]),
    3: (False, [-2, -1]),
    4: (False, [-2]),
    5: (True, []),
    6: (True, [-1]),
    7: (True, [-2, -1]),
    8: (True, [-2]),
}


def _parse_exif(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exif.load(data)
    return exif


def _turn(pixels: Tensor, read_exif: Callable[[], Image.Exif]) -> Tensor:
    """Turn [3, H, W] as the EXIF data says, parsed by Pillow whatever decoded the image.

    torchvision's parser looks at a JPEG's first APP1 segment only, which may hold XMP.
    """
    try:
        orientation = read_exif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata; Pillow raises many kinds
        return pixels
    if orientation not in TURNS:
        return pixels
    swap, flips = TURNS[orientation]
    return (pixels.transpose(-2, -1) if swap else pixels).flip(flips)


def square(images: Tensor, size: int) -> Tensor:
    """Return the central squares [..., C, size, size] of uint8 [..., C, H, W]."""
    if images.shape[-2:] == (size, size):
        return images
    # Cut before it is resized: a strip of 1 x 5000 pixels would first become a huge one.
    images = F.center_crop(images, [min(images.shape[-2:])])
    return F.resize(images, [size, size], antialias=True)


def grey(images: Tensor) -> Tensor:
    """Return uint8 [..., 1, H, W] of [..., 3, H, W]; what is grey already keeps its values.

    torchvision's weights add up to 0.9999, and of uint8 it cuts the fraction off: 255 became 254.
    """
    return F.rgb_to_grayscale(images.float()).round().byte()
