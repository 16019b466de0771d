"""Image files as a dataset: CLASS/*, {train,val,test}/CLASS/*, or a manifest that lists them."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from lab.data import DataConfig
from lab.data.cache import stat_files
from lab.data.decode import FileImages
from lab.data.types import Paths, RawSplits, Split, is_text, normalized
from lab.errors import UserError, name_some

SPLIT_NAMES = {  # the names that a split's directory may have, case-insensitive
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MANIFEST_SUFFIXES = (".csv", ".jsonl")
COLUMNS = ("file", "label", "split")  # of a manifest; `split` may be missing


def read_folder(config: DataConfig) -> RawSplits:
    """Return the splits of a manifest, or of a directory of classes or of splits with classes.

    The directories of splits may have any of the usual names (SPLIT_NAMES). Class names are the
    sorted directory names in Unicode's composed form (NFC), without names that begin with a dot.
    Raises `UserError` if a directory is missing, unreadable or ambiguous, if there are no classes
    or a class is empty, or if `val` or `test` has other classes than `train`.
    """
    root = Path(config.dataset)
    if root.suffix.lower() in MANIFEST_SUFFIXES:
        return read_manifest(root, config)
    split_dirs = _split_dirs(root)
    class_dirs = {name: _class_dirs(directory) for name, directory in split_dirs.items()}
    class_names = tuple(class_dirs["train"])
    if not class_names:
        raise UserError(
            f"{split_dirs['train']} contains no class directories",
            "Put the images of each class into a directory of its own",
        )
    other_files: list[str] = []
    splits = {}
    for name, directories in class_dirs.items():
        _check_same_classes(split_dirs[name], directories, class_names)
        paths, labels = _list_split(directories, other_files)
        images = FileImages.create(paths, stat_files(paths), config)
        splits[name] = Split(images, torch.tensor(labels), class_names, images.paths, str(root))
    warnings = []
    outside = [name for name in _list_directory(split_dirs["train"])[1] if _is_image(name)]
    if outside:
        warnings.append(
            f"ignored {len(outside)} images in no class directory, for example "
            f"{split_dirs['train'] / outside[0]}"
        )
    if other_files:
        warnings.append(
            f"ignored {len(other_files)} files in class directories, for example "
            f"{min(other_files)}: not {', '.join(SUFFIXES)}"
        )
    return RawSplits(splits["train"], splits.get("val"), splits.get("test"), tuple(warnings))


def read_manifest(path: Path, config: DataConfig) -> RawSplits:
    """Return the splits that a manifest lists, each in the order of its lines.

    A manifest is a CSV file with a header, or a file with one JSON object per line. Its columns are
    `file`, a path relative to the manifest's directory and inside it, `label`, the name of the
    class, and possibly `split`, a name of SPLIT_NAMES. Class names are sorted. Raises `UserError`
    if the manifest is invalid or lists a file that does not exist.
    """
    root, listed = path.parent, _list_files(path)
    class_names = tuple(sorted(set(listed["train"].values())))
    class_labels = {name: label for label, name in enumerate(class_names)}
    splits = {}
    for split, labels in listed.items():
        if labels:
            _check_same_classes(f"the {split} split of {path}", set(labels.values()), class_names)
            prefix = str(root / "_")[:-1]  # joining each file by pathlib would take as long
            paths = Paths(prefix + file for file in labels)
            stats = stat_files(paths)
            if missing := [paths[i] for i in (stats[:, 0] < 0).nonzero().flatten().tolist()]:
                raise UserError(
                    f"{path} lists files that do not exist or cannot be read: {name_some(missing)}",
                    "Paths are relative to the directory of the manifest",
                )
            images = FileImages.create(paths, stats, config)
            numbers = torch.tensor([class_labels[label] for label in labels.values()])
            splits[split] = Split(images, numbers, class_names, images.paths, str(root))
    return RawSplits(splits["train"], splits.get("val"), splits.get("test"))


def _list_files(path: Path) -> dict[str, dict[str, str]]:
    """Return the label of each file that a manifest lists, for each split. Raises `UserError`."""
    listed: dict[str, dict[str, str]] = {split: {} for split in SPLIT_NAMES}  # file: label
    lines: dict[str, int] = {}  # file: line
    has_split = None
    for line, row in _manifest_rows(path):
        where = f"line {line} of {path}"
        if has_split not in (None, "split" in row):
            article = "a" if "split" in row else "no"
            raise UserError(
                f"{where} has {article} split, unlike the lines before it",
                "Give the split in all lines, or in none",
            )
        has_split = "split" in row
        if unknown := sorted(row.keys() - set(COLUMNS)):
            raise UserError(
                f"{where} has the unknown column {unknown[0]!r}", f"Use {', '.join(COLUMNS)} only"
            )
        for column in COLUMNS[: 3 if "split" in row else 2]:
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{where} has the {column} {value!r}", f'Write it as "{value}"')
            if value is None or not value.strip():
                raise UserError(f"{where} has no {column}", "Add it, or delete the line")
        file, split = os.path.normpath(row["file"]), row.get("split", "train").strip().lower()
        if not is_text(row["label"]):
            raise UserError(f"{where} has the label {row['label']!a}, not UTF-8", "Correct it")
        if not _can_be_a_path(file):
            raise UserError(f"{where} names {file!a}, which cannot be a path", "Correct it")
        if os.path.isabs(file) or file.split(os.sep)[0] == os.pardir:
            raise UserError(
                f"{where} names {row['file']}, which is not in the manifest's directory",
                "Move the manifest to a directory that contains all files, and use relative paths",
            )
        if split not in SPLIT_OF:
            raise UserError(f"{where} has the split {row['split']!r}", "Use train, val or test")
        if file in lines:
            raise UserError(
                f"{where} lists {row['file']} again, like line {lines[file]}", "Delete one of them"
            )
        lines[file] = line
        listed[SPLIT_OF[split]][file] = sys.intern(normalized(row["label"].strip()))
    if not listed["train"]:
        raise UserError(
            f"{path} lists no training images",
            "Add some; to evaluate on all images, leave out the splits and give --split all",
        )
    return listed


def _can_be_a_path(text: str) -> bool:
    """Return whether the operating system accepts a text as a path."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _manifest_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the columns of each line of a manifest. Raises `UserError`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file, restkey="beyond the header", strict=True)
                names = reader.fieldnames or []
                if len(set(names)) < len(names):
                    raise ValueError("line 1: a column is repeated")
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"line {number}: {error.msg}") from error
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is not a JSON object")
                    yield number, row
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})", "Check the path") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(
            f"{path} is not a valid manifest ({error})",
            "Give a CSV file with a header, or one JSON object per line",
        ) from error


def _split_dirs(root: Path) -> dict[str, Path]:
    """Return the directory of each split; the root as "train" if it contains the classes.

    Raises `UserError` if the names are ambiguous.
    """
    names, _ = _list_directory(root)
    spellings = {
        split: [name for name in names if name.lower() in split_names]
        for split, split_names in SPLIT_NAMES.items()
    }
    for spelled in spellings.values():
        if len(spelled) > 1:
            raise UserError(
                f"{root} has both {spelled[0]} and {spelled[1]}, two names of the same split",
                "Remove one of them",
            )
    present = {split: spelled[0] for split, spelled in spellings.items() if spelled}
    if not present:
        return {"train": root}
    if "train" not in present:
        [name, *_] = present.values()
        raise UserError(
            f"{root} has a directory {name}, but no directory train",
            f"Rename the directory to train on to train; to evaluate, give {root / name} and "
            f"--split all; if {name} is a class, move all class directories into a directory train",
        )
    rest = [name for name in names if name not in present.values()]
    # Directories that cannot be read there, such as lost+found, are not part of the dataset.
    with_images = (n for n in rest if any(list_images(root / n, on_error=lambda _: None)))
    if (extra := next(with_images, None)) is not None:
        raise UserError(
            f"{root} has the directory {present['train']} and next to it {extra}, which contains "
            f"images, too: {present['train']} may be a split or a class",
            f"Move {extra} elsewhere; if both are classes, move all class directories into a "
            "directory train",
        )
    return {split: root / name for split, name in present.items()}


def _class_dirs(root: Path) -> dict[str, list[Path]]:
    """Return the directories of each class by its name, sorted.

    A class has several directories if its name was written composed (NFC) and decomposed (NFD), as
    after copying from another system; the names look the same.
    """
    directories: dict[str, list[Path]] = {}
    for name in _list_directory(root)[0]:
        directories.setdefault(normalized(name), []).append(root / name)
    return dict(sorted(directories.items()))


def _check_same_classes(
    split: Path | str, names: Iterable[str], class_names: Iterable[str]
) -> None:
    """Raise `UserError` if the classes of a split are not those of the training split."""
    for problem, different in (
        ("has classes that the training split lacks", set(names) - set(class_names)),
        ("lacks classes of the training split", set(class_names) - set(names)),
    ):
        if different:
            raise UserError(
                f"{split} {problem}: {', '.join(sorted(different))}",
                "Every split needs images of the same classes",
            )


def _list_split(
    class_dirs: Mapping[str, Sequence[Path]], other_files: list[str]
) -> tuple[list[str], list[int]]:
    """Return the paths of a split's images, sorted within a class, and their labels."""
    paths: list[str] = []
    labels: list[int] = []
    for label, directories in enumerate(class_dirs.values()):
        class_paths = [p for directory in directories for p in list_images(directory, other_files)]
        if not class_paths:
            raise UserError(
                f"the class directory {directories[0]} contains no images",
                f"Add some ({', '.join(SUFFIXES)}), or delete the directory",
            )
        paths += sorted(class_paths, key=normalized)
        labels += [label] * len(class_paths)
    return paths, labels


def list_images(
    root: Path,
    other_files: list[str] | None = None,
    on_error: Callable[[OSError], None] | None = None,
) -> Iterator[str]:
    """Yield the paths of the images at any depth below a directory; hidden ones are ignored.

    Files of other types are appended to `other_files`, except those that file managers create.
    Raises `UserError` if a directory cannot be read, unless `on_error` is given.
    """
    seen = set()
    walk = os.walk(root, onerror=on_error or _raise_unreadable, followlinks=True)
    for directory, subdirectories, files in walk:
        # A symbolic link to a parent directory would list all images again.
        if (real_path := os.path.realpath(directory)) in seen:
            subdirectories.clear()
            continue
        seen.add(real_path)
        # Editors keep copies of images in hidden directories. In place, so that os.walk skips them.
        subdirectories[:] = [name for name in subdirectories if not _is_hidden(name)]
        for name in files:
            if _is_hidden(name):
                continue
            if _is_image(name):
                yield os.path.join(directory, name)
            elif other_files is not None and name.lower() not in ("thumbs.db", "desktop.ini"):
                other_files.append(os.path.join(directory, name))


def _list_directory(directory: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of subdirectories and of other entries; hidden ones are ignored."""
    subdirectories: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not _is_hidden(entry.name):
                    (subdirectories if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UserError(
                f"there is no directory {directory}",
                "Set --dataset to a directory with the images of each class in a subdirectory",
            ) from error
        _raise_unreadable(error)
    return sorted(subdirectories), sorted(files)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot read the directory {error.filename} ({error.strerror})", "Check its permissions"
    ) from error


def _is_hidden(name: str) -> bool:
    # Archives made on a Mac contain __MACOSX, with a hidden file for each image.
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
