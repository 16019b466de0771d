"""Directories of images: which files are in which split, and how every format is decoded."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lab.data import DataConfig
from lab.data.decode import decode
from lab.data.image_folder import read_folder
from lab.data.splits import load_splits
from lab.data.transforms import EvalTransform

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def corners() -> Image.Image:
    """40 x 40 pixels: red, green over blue, white."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20, :20], pixels[:20, 20:], pixels[20:, :20], pixels[20:, 20:] = RED, GREEN, BLUE, 255
    return Image.fromarray(pixels)


def assert_close(found: torch.Tensor, expected: Image.Image) -> None:
    """In the middle of each quarter: JPEG smears edges."""
    expected = torch.from_numpy(np.array(expected.convert("RGB"))).permute(2, 0, 1)
    difference = (found.int() - expected.int()).abs()[:, 10::20, 10::20]
    assert difference.max() <= 8


def config(root: Path, size: int = 32) -> DataConfig:
    return DataConfig(str(root), "data", size, 0.1, 0.2, 0, 0, 0)


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        corners().save(root / name)
        with open(root / name, "ab") as file:
            file.write(name.encode())  # no file is the same as another


def listed(root: Path, name: str = "train") -> list[tuple[str, str]]:
    """Return (class, path below the root) of each image of a split, in order."""
    split = getattr(read_folder(config(root)), name)
    paths = [str(Path(path).relative_to(root)) for path in split.images.paths]
    return [(split.class_names[i], p) for i, p in zip(split.labels.tolist(), paths, strict=True)]


# Manifests


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_manifest_lists_files_of_any_layout(tmp_path, suffix):
    write(tmp_path, "x/0.png", "x/1.jpg", "2.png")
    rows = [("x/1.jpg", "dog", "training"), ("x/0.png", "cat", "Train"), ("2.png", "dog", "test"),
            ("./x/../3.png", "cat", "test")]  # fmt: skip
    write(tmp_path, "3.png")
    manifest = tmp_path / f"list.{suffix}"
    if suffix == "csv":
        lines = ["file,label,split", *map(",".join, rows)]
        manifest.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    else:
        keys = ("file", "label", "split")
        manifest.write_text(
            "\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
        )
    parts = read_folder(config(manifest))
    assert parts.train.class_names == ("cat", "dog")
    assert (parts.train.files(), parts.train.labels.tolist()) == (["x/1.jpg", "x/0.png"], [1, 0])
    assert parts.val is None
    assert (parts.test.files(), parts.test.labels.tolist()) == (["2.png", "3.png"], [1, 0])
    assert_close(parts.test.images[torch.arange(2)][0], corners().resize((32, 32)))


# Layouts


def test_a_directory_of_classes_is_one_split_with_sorted_classes(tmp_path):
    write(tmp_path, "b/0.png", "a/1.png", "a/0.png", "B/0.png", "10/0.png", "9/0.png")
    parts = read_folder(config(tmp_path))
    assert parts.train.class_names == ("10", "9", "B", "a", "b")
    assert (parts.val, parts.test) == (None, None)
    assert listed(tmp_path) == [
        ("10", "10/0.png"),
        ("9", "9/0.png"),
        ("B", "B/0.png"),
        ("a", "a/0.png"),
        ("a", "a/1.png"),
        ("b", "b/0.png"),
    ]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", None, "Test"),
        ("training", "validation", "testing"),
        ("TRAIN", "Valid", None),
        ("train", "VAL", "Testing"),
    ],
)
def test_split_directories_have_any_usual_name_in_any_case(tmp_path, train, val, test):
    for folder in filter(None, (train, val, test)):
        write(tmp_path, f"{folder}/a/0.png", f"{folder}/b/0.png")
    (tmp_path / "lost+found").mkdir()  # directories without images are ignored
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/0.xml").write_text("x")
    for part, folder in (("train", train), ("val", val), ("test", test)):
        if folder:
            expected = [("a", f"{folder}/a/0.png"), ("b", f"{folder}/b/0.png")]
            assert listed(tmp_path, part) == expected
        else:
            assert getattr(read_folder(config(tmp_path)), part) is None


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    """As macOS and Linux write the same name."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write(tmp_path, f"train/{composed}/0.png", "train/bar/0.png")
    write(tmp_path, f"train/{decomposed}/1.png", f"train/{decomposed}/-.png")
    write(tmp_path, f"val/{decomposed}/0.png", "val/bar/0.png")
    parts = read_folder(config(tmp_path))
    assert parts.train.class_names == parts.val.class_names == ("bar", composed)
    assert listed(tmp_path) == [
        ("bar", "train/bar/0.png"),
        (composed, f"train/{decomposed}/-.png"),
        (composed, f"train/{composed}/0.png"),
        (composed, f"train/{decomposed}/1.png"),
    ]


def test_nested_directories_belong_to_their_class_and_hidden_ones_do_not(tmp_path):
    write(tmp_path, "a/x/y/0.png", "a/x/1.png", "a/2.png", "b/0.png")
    write(tmp_path, "a/.copies/0.png", "a/.3.png", ".git/0.png", "__MACOSX/0.png")
    (tmp_path / "a/notes.txt").write_text("x")
    (tmp_path / "labels.csv").write_text("x")
    assert listed(tmp_path) == [
        ("a", "a/2.png"),
        ("a", "a/x/1.png"),
        ("a", "a/x/y/0.png"),
        ("b", "b/0.png"),
    ]


def test_sizes_and_formats_may_be_mixed(tmp_path):
    names = ["0.jpg", "1.JPEG", "2.png", "3.webp", "4.BMP"]
    for i, name in enumerate(names):
        (tmp_path / "a").mkdir(exist_ok=True)
        corners().resize((40 + 20 * i, 80)).save(tmp_path / "a" / name)
    write(tmp_path, "b/0.png")
    images = read_folder(config(tmp_path, size=24)).train.images
    assert images.shape == (6, 3, 24, 24)
    decoded = images.decode_all(num_workers=2)
    assert (decoded.shape, decoded.dtype) == ((6, 3, 24, 24), torch.uint8)
    index = torch.tensor([5, 0, 3])
    assert torch.equal(images[index], decoded[index])
    assert torch.equal(images.select(index).decode_all(1), decoded[index])


def test_one_warning_reports_all_files_of_other_types(tmp_path, capsys):
    write(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png")
    for name in ("train/b/x/1.gif", "test/a/notes.txt", "train/a/.DS_Store", "test/b/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    write(tmp_path, "train/a/1.png", "train/b/1.png")
    load_splits(config(tmp_path), math.inf, 1)
    assert capsys.readouterr().err == (
        f"warning: ignored 2 files in class directories, for example {tmp_path}/test/a/notes.txt: "
        "not .jpg, .jpeg, .png, .webp, .bmp\n"
    )


# Decoding


def save_png16(path: Path) -> None:
    """Write an image with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    rows = np.asarray(corners()).astype(">u2") * 257
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK"])
def test_every_mode_decodes_as_pillow_converts_it(tmp_path, mode, name):
    image = corners().convert(mode)
    try:
        image.save(tmp_path / name, quality=95)
    except OSError:
        pytest.skip(f"Pillow writes no such {name}")
    with Image.open(tmp_path / name) as expected:
        assert_close(EvalTransform(40)(decode(str(tmp_path / name))), expected)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    save_png16(tmp_path / "rgb.png")
    assert_close(EvalTransform(40)(decode(str(tmp_path / "rgb.png"))), corners())
    gray = corners().convert("L")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / "gray.png")
    assert_close(EvalTransform(40)(decode(str(tmp_path / "gray.png"))), gray)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif, path = Image.Exif(), tmp_path / f"x.{suffix}"
    exif[0x112] = orientation
    turned = Image.Transpose
    undo = {  # from what is seen to what is stored
        2: turned.FLIP_LEFT_RIGHT,
        3: turned.ROTATE_180,
        4: turned.FLIP_TOP_BOTTOM,
        5: turned.TRANSPOSE,
        6: turned.ROTATE_90,
        7: turned.TRANSVERSE,
        8: turned.ROTATE_270,
    }
    stored = corners().transpose(undo[orientation]) if orientation > 1 else corners()
    stored.save(path, exif=exif, quality=95)
    assert_close(EvalTransform(40)(decode(str(path))), corners())


def test_transparency_is_dropped_and_an_animation_is_its_first_image(tmp_path):
    image = corners()
    others = [Image.new("RGB", (40, 40)), Image.new("RGB", (40, 40), BLUE)]
    for name, kind in (("x.webp", "WEBP"), ("x.png", "PNG"), ("gif.jpg", "GIF")):
        image.save(tmp_path / name, kind, save_all=True, append_images=others)
        assert_close(EvalTransform(40)(decode(str(tmp_path / name))), image)
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    assert_close(EvalTransform(40)(decode(str(tmp_path / "clear.png"))), corners())


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (40, 41)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_any_shape_becomes_a_square(tmp_path, shape, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", shape, (10, 100, 200)).save(path, quality=95)
    image = EvalTransform(224)(decode(str(path)))
    assert (image.shape, image.dtype) == ((3, 224, 224), torch.uint8)
    assert (image.flatten(1).int() - torch.tensor([[10], [100], [200]])).abs().max() <= 3


@pytest.mark.parametrize("across", [True, False])
def test_the_central_square_is_taken(tmp_path, across):
    image = Image.new("RGB", (120, 40) if across else (40, 120), BLUE)
    image.paste(corners(), (40, 0) if across else (0, 40))
    image.save(tmp_path / "x.png")
    assert_close(EvalTransform(40)(decode(str(tmp_path / "x.png"))), corners())
