"""A directory of images as a dataset: CLASS/*, or {train,val,test}/CLASS/*."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from lab.data.cache import stat_files
from lab.data.decode import FileImages
from lab.data.types import RawSplits, Split, normalized
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data import DataConfig

SPLIT_NAMES = {  # the names that a split's directory may have, case-insensitive
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_folder(config: DataConfig) -> RawSplits:
    """Return the splits in a directory with `train`, `val` and `test`, or one split of its classes.

    The directories of splits may have any of the usual names (SPLIT_NAMES). Class names are the
    sorted directory names in Unicode's composed form (NFC), without names that begin with a dot.
    Raises `UserError` if a directory is missing, unreadable or ambiguous, if there are no classes
    or a class is empty, or if `val` or `test` has other classes than `train`.
    """
    root = Path(config.data_dir)
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
        images = FileImages(tuple(paths), config.image_size, stat_files(paths))
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
    return RawSplits(**splits, warnings=tuple(warnings))


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
            f"Rename the directory to train on to train; if {name} is a class, move all class "
            "directories into a directory train",
        )
    rest = [name for name in names if name not in present.values()]
    # Directories that cannot be read there, such as lost+found, are not part of the dataset.
    with_images = (n for n in rest if any(pictures(root / n, on_error=lambda _: None)))
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


def _check_same_classes(root: Path, names: Iterable[str], class_names: Iterable[str]) -> None:
    """Raise `UserError` if the classes in `root` are not those of the training split."""
    for problem, different in (
        ("has classes that the training split lacks", set(names) - set(class_names)),
        ("lacks classes of the training split", set(class_names) - set(names)),
    ):
        if different:
            raise UserError(
                f"{root} {problem}: {', '.join(sorted(different))}",
                "Every split needs the same class directories",
            )


def _list_split(
    class_dirs: Mapping[str, Sequence[Path]], other_files: list[str]
) -> tuple[list[str], list[int]]:
    """Return the paths of a split's images, sorted within a class, and their labels."""
    paths: list[str] = []
    labels: list[int] = []
    for label, directories in enumerate(class_dirs.values()):
        class_paths = [p for directory in directories for p in pictures(directory, other_files)]
        if not class_paths:
            raise UserError(
                f"the class directory {directories[0]} contains no images",
                f"Add some ({', '.join(SUFFIXES)}), or delete the directory",
            )
        paths += sorted(class_paths, key=normalized)
        labels += [label] * len(class_paths)
    return paths, labels


def pictures(
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
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
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
                if not entry.name.startswith("."):
                    (subdirectories if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UserError(
                f"there is no directory {directory}",
                "Set --data-dir to a directory with the images of each class in a subdirectory",
            ) from error
        _raise_unreadable(error)
    return sorted(subdirectories), sorted(files)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot read the directory {error.filename} ({error.strerror})", "Check its permissions"
    ) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
