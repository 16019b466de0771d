"""export.py: one file that computes what evaluation does, says what it is, and holds no pickle."""

import io
import json
import re
import textwrap
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import export
import lab
from lab import export as exporting
from lab.checkpoint import weights
from lab.data import DataConfig
from lab.data.decode import decode
from lab.data.splits import load_split
from lab.data.transforms import BatchTransform, EvalTransform, to_grayscale
from lab.models import build_model

MISSING = "the extra `onnx` is not installed"
onnx = pytest.importorskip("onnx", reason=MISSING)
pytest.importorskip("onnxscript", reason=MISSING)
pytest.importorskip("onnxruntime", reason=MISSING)

FORMATS = {"onnx": "best.onnx", "torch-export": "best.pt2"}


def call(*words):
    export.main([str(word) for word in (*words, "--threads", "1")])


@pytest.fixture(scope="module")
def digits(finished):
    """(test images uint8 [N, 1, 32, 32], the run's predictions int64 [N])."""
    metadata = weights.read_metadata(finished / "best.safetensors")
    images = load_split(DataConfig(**metadata["data"]), "test", 1e9, 1)[0].images
    rows = np.loadtxt(finished / "predictions.csv", delimiter=",", skiprows=1, usecols=2)
    return images, rows.astype(int)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The folder of best.onnx and best.pt2, for any number of images."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, name in FORMATS.items():
        call(finished, "--format", kind, "--dynamic-batch", "--output", folder / name)
    return folder


def snippets():
    """The code of `export.py --help` by format: what prepares images, then what loads a file."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", export.__doc__, re.MULTILINE)
    prepare, *loads = (textwrap.dedent(block) for block in blocks if "import" in block)
    return {kind: prepare + load for kind, load in zip(FORMATS, loads, strict=True)}


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """Digits as files of people: in color, larger, not square, turned by their EXIF data."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for k, image in enumerate(digits[0][:24]):
        large = Image.fromarray(image[0].numpy()).convert("RGB").resize((90, 90))
        whole = ImageOps.expand(large, (3 + k, 0), fill=(200, 30, 90))
        exif = Image.Exif()
        if k % 2:
            whole, exif[0x0112] = whole.transpose(Image.Transpose.ROTATE_90), 6
        paths.append(str(folder / (f"{k}.jpg" if k % 3 else f"{k}.png")))
        whole.save(paths[-1], exif=exif)
    deep = digits[0][3, 0].numpy().astype("uint16") * 257
    paths.append(str(folder / "16 bits.png"))
    Image.fromarray(deep).save(paths[-1])
    return paths


@pytest.mark.parametrize("kind", FORMATS)
def test_the_documented_code_gives_the_same_classes_as_lab(
    exported, finished, pictures, monkeypatch, kind
):
    expected = lab.predict(pictures, str(finished))
    monkeypatch.chdir(exported)
    known = {"paths": pictures}
    exec(snippets()[kind], known)
    assert known["names"] == list(expected.names)
    assert len(set(known["names"])) > 3
    prepared = to_grayscale(torch.stack([EvalTransform(32)(decode(path)) for path in pictures]))
    assert known["images"].shape == prepared.shape
    # Pillow and torchvision round gray levels in other ways; the next filter is off by 6 here.
    assert (torch.from_numpy(known["images"]).int() - prepared.int()).abs().max() <= 4
    found = torch.as_tensor(known["outputs"]).softmax(1)
    assert (found - torch.as_tensor(expected.probabilities)).abs().max() < 0.02


@pytest.mark.parametrize("kind", FORMATS)
def test_an_exported_file_repeats_the_runs_predictions(exported, digits, kind):
    images, expected = digits
    run = exporting.load((exported / FORMATS[kind]).read_bytes(), kind)
    assert run(images).argmax(1).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_one_image_of_probabilities(finished, digits, tmp_path, capsys, kind):
    path = tmp_path / "model"
    call(finished, "--format", kind, "--softmax", "--output", path)
    run = exporting.load(path.read_bytes(), kind)
    found = torch.cat([run(digits[0][i : i + 1]) for i in range(20)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(20))
    assert found.argmax(1).tolist() == list(digits[1][:20])
    with pytest.raises(Exception, match=r"(?i)expected|invalid"):  # of either library
        run(digits[0][:2])
    [difference, bound] = re.search(
        r"model: (\S+) \(bound: (\S+)\)", capsys.readouterr().out
    ).groups()
    assert 0 < float(difference) < float(bound) < 0.1


@pytest.mark.parametrize("name", FORMATS.values())
def test_p4_no_pickle_and_no_path_of_this_machine_is_in_the_file(exported, name):
    content = (exported / name).read_bytes()
    for trace in (b"site-packages", b"forward(", str(export.__file__).encode()):
        assert trace not in content
    if name.endswith(".onnx"):
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {n.split("/", 1)[1]: archive.read(n) for n in archive.namelist()}
    for entry, data in entries.items():
        if entry.startswith("data/weights/weight_"):
            continue  # bytes of numbers: see the configuration below
        assert not data.startswith((b"PK", b"\x80")), entry
    assert entries["data/sample_inputs/model.pt"] == b""
    for part in ("weights", "constants"):
        config = json.loads(entries[f"data/{part}/model_{part}_config.json"])["config"]
        assert not any(one["use_pickle"] for one in config.values())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("vit_tiny", 8), ("googlenet", 16)])
def test_other_networks(model, size):
    """googlenet has auxiliary classifiers, vit a token that is repeated for each image."""
    arguments = {"name": model, "num_classes": 3, "in_chans": 3, "image_size": size}
    metadata = {"model": arguments, "class_names": list("abc"), "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.2], "temperature": 0.5, "best_epoch": 1,
            "data": asdict(DataConfig("digits", "", size, 0, 0, 0, 0, 0))}  # fmt: skip
    torch.manual_seed(0)
    built_model = build_model(**arguments).eval()
    for parameter in built_model.parameters():
        if len(parameter) == 3:  # heads may begin with zeros
            torch.nn.init.normal_(parameter)
    description = exporting.describe(metadata, dynamic_batch=True, softmax=False)
    content = exporting.pack(built_model, metadata, "torch-export", description)
    run = exporting.load(content, "torch-export")
    plain = BatchTransform(metadata["mean"], metadata["std"], (), "cpu")
    difference, bound = exporting.largest_difference(run, description, built_model, plain, (1, 3))
    assert difference < bound


def test_a_file_that_computes_something_else_is_not_kept(fails, finished, monkeypatch):
    pack = exporting.pack

    def without_mean(model, metadata, kind, description):
        return pack(model, metadata | {"mean": [0.0]}, kind, description)

    monkeypatch.setattr(exporting, "pack", without_mean)
    words = (finished, "--format", "torch-export", "--output", "x.pt2")
    message = fails(export, *words)
    assert re.match(
        r"the outputs of the exported file differ by \S+, more than \S+, from those", message
    )
    assert message.endswith("Try the other --format.")


def test_p7_a_missing_extra_is_named(fails, finished, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if "run" in name else name)
    assert fails(export, finished) == (
        "--format onnx needs onnxruntime. Run pip install -e '.[onnx]' in lab's checkout."
    )


def test_p7_a_network_that_cannot_be_exported_is_named(fails, finished, monkeypatch):
    def branches(model, images):
        return images.float() if images.sum() > 0 else images

    monkeypatch.setattr(exporting.ExportedModel, "forward", branches)
    message = fails(export, finished, "--format", "torch-export")
    assert message.startswith("lenet5 cannot be exported (")
    assert message.endswith("). Try the other --format, or leave out --dynamic-batch.")


def test_p7_a_network_that_onnx_runtime_cannot_run_is_named(fails, finished, monkeypatch):
    import onnxruntime

    def fail(*_, **__):
        raise onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented("no Conv(11)\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    assert fails(export, finished) == (
        "ONNX Runtime cannot run the model (no Conv(11)). Try --format torch-export."
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gone", "there is no file gone. Give a run's directory or its best.safetensors."),
        ("RUN --format tflite", "invalid --format 'tflite': expected one of onnx, torch-export."),
        ("RUN --output a/b", "invalid --output a/b: there is no directory a. Create it first."),
        (
            "RUN --model lenet5",
            "--model is only for a function of yours, and RUN/best.safetensors holds lenet5. "
            "Leave out --model.",
        ),
        (
            "RUN --output model.pt2",
            "--output model.pt2 ends in .pt2, but --format is onnx. Add --format torch-export.",
        ),
        (
            "RUN/best.safetensors --output RUN/best.safetensors",
            "--output RUN/best.safetensors is the file of the weights. Give another file.",
        ),
    ],
)
def test_p7_export_refuses(fails, finished, words, message):
    run = str(finished)
    assert fails(export, *words.replace("RUN", run).split()) == message.replace("RUN", run)
