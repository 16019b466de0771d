"""Hostile image files start no program, do not block, and do not fill the memory."""

import io
import os
import struct
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.transforms.v2 import functional as TF

from lab.config.recipes import resolve
from lab.data import DataConfig
from lab.data import decode as module
from lab.data.decode import FileImages, decode
from lab.data.transforms import EvalTransform, SampleTransform
from lab.errors import UserError
from lab.inference import _ImageDataset

METADATA = {  # of weights, the part that `_ImageDataset` reads
    "data": asdict(DataConfig.of(resolve({"image_size": 40}))),
    "model": {"image_size": 40, "in_chans": 3},
}
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'></x:xmpmeta>"


def reason(path) -> str:
    with pytest.raises(UserError) as caught:
        EvalTransform(16)(decode(str(path)))
    what = caught.value.what
    assert what.startswith(f"cannot read the image {path} (")
    return what.partition(" (")[2].removesuffix(")")


@pytest.fixture
def image():
    """Return a smooth image of 24 x 40 pixels, which JPEG hardly changes, with unequal corners."""
    y, x = np.mgrid[:40, :24]
    return Image.fromarray(np.stack([6 * y, 10 * x, 255 - 6 * y], 2).astype(np.uint8))


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_is_found_behind_an_xmp_segment(tmp_path, image, orientation):
    """Photoshop and some phones write files like this."""
    exif, plain, stream = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x112] = orientation
    image.save(plain, "JPEG", quality=95)
    image.save(stream, "JPEG", quality=95, exif=exif)
    path, upright = tmp_path / "x.jpg", tmp_path / "upright.png"
    content = stream.getvalue()
    path.write_bytes(content[:2] + segment(0xE1, XMP) + content[2:])
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # Pillow's numbers for what each orientation undoes
    seen = Image.open(plain).convert("RGB")
    (seen if orientation == 1 else seen.transpose(turns[orientation])).save(upright)
    found, expected = EvalTransform(24)(decode(str(path))), EvalTransform(24)(decode(str(upright)))
    assert (found.int() - expected.int()).abs().max() <= 3


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.parametrize("name", ["x.jpg", "x.webp"])
def test_damaged_metadata_leaves_the_image_as_it_is(tmp_path, recwarn, image, name, exif):
    image.save(tmp_path / name, quality=95, exif=exif)
    image.save(tmp_path / f"plain-{name}", quality=95)
    plain = EvalTransform(24)(decode(str(tmp_path / f"plain-{name}")))
    assert torch.equal(EvalTransform(24)(decode(str(tmp_path / name))), plain)
    assert not recwarn.list


@pytest.mark.parametrize(("kind", "name"), [("EPS", "x.png"), ("EPS", "x.jpg"), ("TIFF", "x.png")])
def test_other_formats_are_not_opened_whatever_a_file_is_called(
    tmp_path, monkeypatch, image, name, kind
):
    """Pillow runs Ghostscript on PostScript files."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program ran"))
    image.save(tmp_path / name, kind)
    assert reason(tmp_path / name) == "unknown format"


def claim(kind: str, width: int, height: int) -> bytes:
    """Return a small file whose header claims `width` x `height` pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, kind)
    content = bytearray(stream.getvalue())
    if kind == "JPEG":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        header = b"IHDR" + struct.pack(">II", width, height) + bytes(content[24:29])
        content[12:33] = header + struct.pack(">I", PngImagePlugin._crc32(header))
    elif kind == "BMP":
        content[18:26] = struct.pack("<ii", width, height)
    else:
        content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF"])
@pytest.mark.parametrize("width", [10_001, 60_000])  # just too many, and too many for Pillow too
def test_pixels_are_limited_before_any_is_decoded(tmp_path, monkeypatch, recwarn, kind, width):
    def refuse(*_, **__):
        pytest.fail("it was decoded")

    (tmp_path / "x.png").write_bytes(claim(kind, width, 10_000))
    Image.init()  # it loads an image
    monkeypatch.setattr(Image.Image, "load", refuse)
    assert reason(tmp_path / "x.png") == "more than 100 million pixels"
    assert not recwarn.list


def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch):
    """Opening a named pipe waits until another process writes into it."""
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("it was opened"))
    os.mkfifo(tmp_path / "x.png")
    assert reason(tmp_path / "x.png") == "not a regular file"
    (tmp_path / "y.png").mkdir()
    assert reason(tmp_path / "y.png") == "not a regular file"
    (tmp_path / "z.png").symlink_to(tmp_path / "nothing")
    assert reason(tmp_path / "z.png") == "No such file or directory"


def test_p2_a_large_jpeg_is_decoded_at_a_reduced_scale(tmp_path, image):
    """Training, evaluation and predict.py pass the size of the result; results differ slightly."""
    path = str(tmp_path / "x.jpg")
    image.resize((400, 320)).save(path, quality=95)
    assert decode(path).shape == decode(path, 81).shape == (3, 320, 400)
    assert decode(path, 80).shape == (3, 160, 200)
    assert decode(path, 21).shape == (3, 80, 100)
    reduced, full = EvalTransform(40)(decode(path, 40)), EvalTransform(40)(decode(path))
    assert (reduced.int() - full.int()).abs().max() <= 4
    files = FileImages((path,), EvalTransform(40))
    assert torch.equal(files[torch.tensor([0])][0], reduced)
    crop = SampleTransform((), EvalTransform(40), (0.5,) * 3)
    assert torch.equal(files.augment(torch.tensor([[0, 1]]), crop)[0], reduced)
    [prediction] = _ImageDataset([path], METADATA)[torch.tensor([0])][0]
    assert torch.equal(prediction, reduced)


def test_a_small_part_of_a_large_jpeg_keeps_its_pixels(tmp_path, image):
    path = str(tmp_path / "x.jpg")
    image.resize((800, 640)).save(path, quality=95)
    transform = EvalTransform(40, crop_pct=0.25)
    decoded = decode(path, transform.decode_size)
    assert decoded.shape == (3, 160, 200)  # a quarter of it has 40 pixels
    files = FileImages((path,), transform)
    assert torch.equal(files[torch.tensor([0])][0], transform(decoded))
    augment = SampleTransform((), transform, (0.5,) * 3)
    assert torch.equal(files.augment(torch.tensor([[0, 1]]), augment)[0], transform(decoded))


def test_augmented_images_show_the_part_that_evaluation_does():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, 16:48, 16:48] = 255
    augmented = SampleTransform((), EvalTransform(32, crop_pct=0.5), (0.5,) * 3)(image, seed=0)
    assert torch.equal(augmented, EvalTransform(32, crop_pct=0.5)(image))


def test_p5_another_decoder_is_a_warning(capsys, monkeypatch):
    trained = module.describe_decoder()
    module.warn_of_other_pixels(trained)
    module.warn_of_other_pixels(trained.replace("Pillow ", "Pillow 1."))  # with the same pixels
    assert capsys.readouterr().err == ""
    module.warn_of_other_pixels("Pillow 1.0, pixels 00000000")
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: image files are decoded to other pixels than in training")
    nearest = partial(TF.resize, interpolation=TF.InterpolationMode.NEAREST)
    monkeypatch.setattr(module, "EvalTransform", lambda size: partial(nearest, size=[size, size]))
    assert module.describe_decoder.__wrapped__() != trained
