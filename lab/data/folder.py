"""A folder of pictures as a data set: CLASS/*, or {train,val,test}/CLASS/*."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lab import console
from lab.data.decode import ImageFiles
from lab.data.sources import Parts, Split
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data import DataConfig

VALIDATION = ("val", "valid", "validation")  # any of these names
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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
