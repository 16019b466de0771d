"""Hugging Face datasets: `--dataset hf:NAME` of the Hub, or `hf:PATH` of local files.

The package datasets downloads the files, converts them to memory-mapped Arrow tables in its cache,
and finds the splits. Rows are then read by index, in lab's own order, and images are decoded as
files are.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from lab.config.schema import HUB
from lab.data import DataConfig, cache
from lab.data.decode import FileImages, decode_content, read_file
from lab.data.image_folder import SPLIT_OF
from lab.data.types import RawSplits, Split, normalized
from lab.errors import UserError, first_line, install_hint, name_some

if TYPE_CHECKING:
    import datasets

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # the part after the colon: a configuration
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
SAVED = ("state.json", "dataset_dict.json")  # in a directory of `save_to_disk`


@dataclass(frozen=True)
class RowImages(FileImages):
    """Images in rows of Arrow tables, decoded when they are indexed; `paths` are their names."""

    tables: tuple[datasets.Dataset, ...] = field(default=(), compare=False)  # with one column
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 2), compare=False)  # [N, 2]: (t, r)

    def select(self, index: Tensor) -> Self:
        return replace(super().select(index), rows=self.rows[index])

    def join(self, others: Sequence[Self]) -> Self:
        """Return the concatenation of several sets of images."""
        sets = (self, *others)
        rows, num_tables = [], 0
        for images in sets:
            rows.append(images.rows + torch.tensor([num_tables, 0]))
            num_tables += len(images.tables)
        tables = tuple(table for images in sets for table in images.tables)
        return replace(super().join(others), tables=tables, rows=torch.cat(rows))

    def read(self, i: int, offset: int = 0, num_bytes: int = -1) -> bytes:
        """Return the bytes of an image from `offset` on; none if the row has no image.

        A row without bytes may have the path of a file.
        """
        table, row = self.rows[i].tolist()
        [image] = self.tables[table][row].values()
        if image and image["bytes"] is None and image["path"]:
            return read_file(image["path"], offset, num_bytes)
        content: bytes = (image and image["bytes"]) or b""
        return content[offset:] if num_bytes < 0 else content[offset : offset + num_bytes]

    def decode(self, i: int, size: int = 0) -> Tensor:
        return decode_content(self.paths[i], lambda: self.read(i), size)

    def key(self, transform: Any, change_time: bool = False) -> str:
        """Return a key that changes with the Arrow files and the rows."""
        files = [file["filename"] for table in self.tables for file in table.cache_files]
        columns = [table.column_names for table in self.tables]
        content = self.rows.numpy().tobytes() + self.file_stats().numpy().tobytes()
        rows = hashlib.blake2b(content, digest_size=16).hexdigest()
        stats = cache.stat_files(files)
        return cache.key_of(files, stats, (transform, columns, rows), change_time)


def read_hub(config: DataConfig, download: bool = True) -> RawSplits:
    """Return the splits of a Hugging Face dataset, whose names may be any of `SPLIT_NAMES`.

    Without `download`, only local files and the cache are read. The class names are those of the
    column's type, in its order, or else its sorted values. Raises `UserError`.
    """
    loaded, revision = _load(config, download)
    parts: dict[str, Any] = {}
    warnings = []
    for name, dataset in loaded.items():
        split = SPLIT_OF.get(name.lower())
        if split in parts:
            raise UserError(
                f"{config.dataset} has two {split} splits, one of them {name}", "Remove one of them"
            )
        if split is None:
            warnings.append(f"ignored the split {name} of {config.dataset}")
        else:
            parts[split] = dataset
    if "train" not in parts:
        raise UserError(
            f"{config.dataset} has no training split (its splits: {name_some([*loaded])})",
            "Rename the split to train on to train",
        )
    features = parts["train"].features
    image_column = _find_image_column(features, config)
    label_column = _find_label_column(features, config)
    labels = {split: _read_labels(dataset, label_column) for split, dataset in parts.items()}
    for split in ("val", "test"):
        if split in parts and not (labels[split][1] >= 0).any():
            warnings.append(f"ignored the {split} split of {config.dataset}, which has no labels")
            del parts[split], labels[split]
    class_names, numbers = _number_classes(labels, config)
    images = _read_images(parts, image_column, config)
    root = ""
    if not any(isinstance(part, RowImages) for part in images.values()):
        root = os.path.commonpath([os.path.dirname(p) for i in images.values() for p in i.paths])
    splits = {
        split: Split(images[split], numbers[split], class_names, images[split].paths, root)
        for split in parts
    }
    return RawSplits(
        splits["train"], splits.get("val"), splits.get("test"), tuple(warnings), revision
    )


def _load(config: DataConfig, download: bool) -> tuple[Mapping[str, datasets.Dataset], str]:
    """Return the dataset of each split, and the commit of a dataset of the Hub."""
    try:
        from datasets import Dataset, load_dataset_builder, load_from_disk
    except ImportError as error:
        what = f"{config.dataset} needs the package datasets"
        raise UserError(what, install_hint("hf")) from error
    name, revision = config.dataset.removeprefix(HUB), config.revision
    is_local = os.path.exists(name)
    if not is_local and not HUB_NAME.fullmatch(name):
        raise UserError(f"there is no file or directory {name}", "Check the path")
    if is_local and revision:
        raise UserError(
            f"--revision is for a dataset on the Hub, not for {name}, which is a path",
            "Leave it out",
        )
    repository, _, subset = name.partition(":")
    try:
        with _settings_of_library(offline=is_local or not download):
            if is_local and any(os.path.isfile(os.path.join(name, file)) for file in SAVED):
                saved = load_from_disk(name, keep_in_memory=False)
                return ({"train": saved} if isinstance(saved, Dataset) else saved), ""
            if os.path.isfile(name):
                builder = load_dataset_builder("parquet", data_files={"train": name})
            elif is_local:
                builder = load_dataset_builder(os.path.abspath(name))
            else:
                builder = load_dataset_builder(
                    repository, subset or None, revision=revision or None
                )
            if not is_local:
                _check_revision(builder, name, revision)
            builder.download_and_prepare()
            return builder.as_dataset(), "" if is_local else str(builder.hash)
    except UserError:
        raise
    except Exception as error:  # the library raises exceptions of many types
        raise _load_error(name, is_local, download, error) from error


@contextmanager
def _settings_of_library(offline: bool) -> Iterator[None]:
    """Let the library print only errors and, if `offline`, use no network."""
    import datasets

    hub_logger = logging.getLogger("huggingface_hub")
    before = (datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity(), hub_logger.level)
    bars = datasets.are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = before[0] or offline
    datasets.logging.set_verbosity_error()
    hub_logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before[0]
        datasets.logging.set_verbosity(before[1])
        hub_logger.setLevel(before[2])
        if not bars:
            datasets.enable_progress_bars()


def _check_revision(builder: Any, name: str, revision: str) -> None:
    """Raise `UserError` if the library took another commit than `revision` from its cache.

    Without the network, it takes the latest one that is cached.
    """
    if builder.name == "cache" and revision and not builder.hash.startswith(revision):
        raise UserError(
            f"the revision {revision} of {name} is not the one in the cache, {builder.hash}",
            f"Give --dataset {HUB}{name}, which downloads it, and check the network",
        )


def _load_error(name: str, is_local: bool, download: bool, error: Exception) -> UserError:
    import datasets

    reason = first_line(error)
    if is_local:
        return UserError(
            f"cannot load the dataset {name} ({reason})",
            "Give a directory or file of Parquet, a directory of save_to_disk, or an imagefolder",
        )
    if not isinstance(error, (ConnectionError, FileNotFoundError)):
        hint = "Check the name and --revision; for one of several configurations, give NAME:CONFIG"
        return UserError(f"cannot load the dataset {name} ({reason})", hint)
    entries = Path(datasets.config.HF_DATASETS_CACHE).glob("*___*")  # none if it does not exist
    cached = sorted(p.name.replace("___", "/") for p in entries if p.suffix != ".lock")
    if not download:
        reason = "only a dataset that you name yourself is downloaded"
    return UserError(
        f"the dataset {name} is not cached, and could not be downloaded ({reason})",
        ("Check the name and the network" if download else f"Give --dataset {HUB}{name}")
        + (f"; cached: {name_some(cached)}" if cached else "; no dataset is cached"),
    )


def _find_image_column(features: Mapping[str, Any], config: DataConfig) -> str:
    from datasets import Image

    found = _find_column(features, Image, IMAGE_COLUMNS, "image", config.image_column)
    feature = features[found]
    is_binary = getattr(feature, "dtype", "") in ("binary", "large_binary")
    has_bytes = isinstance(feature, Mapping) and feature.keys() == {"bytes", "path"}
    if not (isinstance(feature, Image) or is_binary or has_bytes):
        raise UserError(
            f"the column {found} of {config.dataset} contains no images, but {_describe(feature)}",
            f"Give --image-column one of {', '.join(features)}",
        )
    return found


def _find_label_column(features: Mapping[str, Any], config: DataConfig) -> str:
    from datasets import ClassLabel

    found = _find_column(features, ClassLabel, LABEL_COLUMNS, "label", config.label_column)
    kind = getattr(features[found], "dtype", "")
    if not isinstance(kind, str) or not re.fullmatch("u?int.*|bool|(large_)?string", kind):
        raise UserError(
            f"the column {found} of {config.dataset} contains no labels, but "
            f"{_describe(features[found])}",
            f"Give --label-column one of {', '.join(features)}",
        )
    return found


def _find_column(
    features: Mapping[str, Any], kind: type, names: Sequence[str], what: str, given: str
) -> str:
    """Return the column that is given, or the only one of a type, or else one of the usual names.

    Raises `UserError` if there is none.
    """
    if given in features:
        return given
    typed = [name for name, feature in features.items() if isinstance(feature, kind)]
    usual = [name for name in names if name in (typed or features)]
    columns = f"its columns are {', '.join(features)}"
    if given:
        raise UserError(f"the dataset has no column {given}; {columns}", f"Correct --{what}-column")
    if len(typed) != 1 and not usual:
        problem = f"{len(typed)} {what} columns" if typed else f"no column of {what}s"
        raise UserError(f"the dataset has {problem}; {columns}", f"Give --{what}-column")
    return typed[0] if len(typed) == 1 else usual[0]


def _describe(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _read_labels(dataset: datasets.Dataset, column: str) -> tuple[list[Any], np.ndarray]:
    """Return the classes in a column, and the position of each row's class, -1 if it has none."""
    from datasets import ClassLabel

    column_type, rows = dataset.features[column], dataset.data.column(column)
    if isinstance(column_type, ClassLabel):
        return column_type.names, rows.fill_null(-1).to_numpy()
    encoded = rows.combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    found = [normalized(value) if isinstance(value, str) else value for value in found]
    classes = sorted(set(found))
    position = {name: i for i, name in enumerate(classes)}
    positions = np.array([*(position[name] for name in found), -1])  # index -1: no class
    return classes, positions[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _number_classes(
    labels: Mapping[str, tuple[list[Any], np.ndarray]], config: DataConfig
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return the class names, and the labels int64 [N] of each split.

    A class without images in any split is left out. Raises `UserError` if rows have no label or
    another split has classes that the training split lacks.
    """
    used: set[Any] = set()
    for split, (classes, codes) in labels.items():
        counts = Counter(normalized(str(name)) for name in classes)
        if repeated := sorted(name for name, count in counts.items() if count > 1):
            raise UserError(
                f"{config.dataset} has several classes named {name_some(repeated)}", "Rename them"
            )
        if num_missing := int((codes < 0).sum()):
            raise UserError(
                f"{num_missing} rows of the {split} split of {config.dataset} have no label",
                "Delete them, or give another --label-column",
            )
        used |= {classes[i] for i in np.unique(codes)}
    if unknown := sorted(map(str, used - set(labels["train"][0]))):
        raise UserError(
            f"{config.dataset} has classes that its training split lacks: {name_some(unknown)}",
            "Every split needs images of the same classes",
        )
    class_labels = {
        name: i for i, name in enumerate(name for name in labels["train"][0] if name in used)
    }
    numbers = {}
    for split, (classes, codes) in labels.items():
        table = np.array([class_labels.get(name, -1) for name in classes], dtype=np.int64)
        numbers[split] = torch.from_numpy(table[codes])
    return tuple(normalized(str(name)) for name in class_labels), numbers


def _read_images(
    parts: Mapping[str, datasets.Dataset], column: str, config: DataConfig
) -> dict[str, FileImages]:
    """Return the images of each split: `FileImages` if all rows contain paths instead of bytes.

    Rows are named after the paths that are stored with the bytes, or SPLIT/ROW unless these paths
    are different for all rows.
    """
    import pyarrow.compute as pc
    from datasets import Image

    tables, stored, contents_of = {}, {}, {}
    for split, dataset in parts.items():
        table = dataset.select_columns([column]).cast_column(column, Image(decode=False))
        tables[split] = table
        stored[split] = pc.struct_field(table.data.column(0), "path").to_pylist()
        contents_of[split] = pc.struct_field(table.data.column(0), "bytes")
    names = [name for part in stored.values() for name in part]
    are_unique = None not in names and len(set(names)) == len(names)
    are_files = are_unique and all(c.null_count == len(c) for c in contents_of.values())
    images: dict[str, FileImages] = {}
    for split, table in tables.items():
        if are_files:
            files = [os.path.abspath(path) for path in stored[split]]
            images[split] = FileImages.create(files, cache.stat_files(files), config)
            continue
        contents = contents_of[split]
        paths = stored[split] if are_unique else [f"{split}/{i}" for i in range(len(contents))]
        stats = torch.zeros(len(paths), 3, dtype=torch.int64)
        stats[:, 0] = torch.tensor(pc.binary_length(contents).fill_null(0).to_numpy().copy())
        for i in pc.indices_nonzero(contents.is_null()).to_pylist():
            if stored[split][i]:  # the row has a file instead of bytes
                stats[i] = cache.stat_files([stored[split][i]])[0]
        rows = torch.stack((torch.zeros_like(stats[:, 0]), torch.arange(len(paths))), dim=1)
        images[split] = replace(RowImages.create(paths, stats, config), tables=(table,), rows=rows)
    return images
