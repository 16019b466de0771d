"""lab from Python: train.main, lab.load_model and lab.predict, in a checkout and from a wheel."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import lab
import predict
import train
from lab.checkpoint import weights
from lab.data import DataConfig
from lab.data.splits import load_split
from lab.errors import UserError

ROOT = Path(lab.__file__).parents[1]
SMALL = ["--dataset", "digits", "--recipe", "smoke", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def images(finished):
    """Digits uint8 [9, 1, 32, 32]."""
    metadata = weights.read_metadata(finished / "best.safetensors")
    return load_split(DataConfig(**metadata["data"]), "test", 1e9, 1)[0].images[:9]


def write_images(images, directory):
    directory.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(directory / f"{i}.png")
    return sorted(directory.glob("*.png"))


def test_every_form_of_images_gives_the_predictions_of_predict_py(finished, images, tmp_path):
    paths = write_images(images, tmp_path)
    table = tmp_path / "out.csv"
    words = [finished, tmp_path, "--csv", table, "--top-k", 1, "--threads", 1, "--workers", 0]
    predict.main([str(word) for word in words])
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    loaded = lab.load_model(finished)
    assert not loaded[0].training
    files = [tmp_path, paths, [str(path) for path in paths], [Image.open(path) for path in paths]]
    arrays = [images, images.numpy(), images.expand(-1, 3, -1, -1)]
    for form in files + arrays:
        prediction = lab.predict(form, loaded, batch_size=4)
        assert prediction.names == [row["class1"] for row in rows]
        assert prediction.names == [prediction.class_names[k] for k in prediction.labels]
        confidence = [float(row["confidence1"]) for row in rows]
        # A gray file becomes RGB and gray again, which may change a pixel by one.
        tolerance = 1e-2 if form is images or form is arrays[1] else 1e-5
        highest = prediction.probabilities.max(1).values
        assert highest.tolist() == pytest.approx(confidence, abs=tolerance)
        assert prediction.probabilities.shape == (9, 10)
    assert lab.predict(tmp_path, loaded).paths == [str(path) for path in paths]
    assert len(lab.predict(tmp_path.glob("*.png"), loaded).paths) == 9
    assert lab.predict(images, finished / "best.safetensors").paths == []
    assert lab.predict(str(paths[0]), finished).names == [rows[0]["class1"]]


def test_the_precision_is_that_of_the_training(copied, images, tmp_path):
    path, dtypes = copied / "best.safetensors", []
    metadata = weights.read_metadata(path) | {"precision": "bf16"}
    weights.write_weights(path, weights.read_tensors(path), metadata)
    directory = tmp_path / "images"
    write_images(images, directory)

    def record(module, _, output):
        if isinstance(module, torch.nn.Linear):
            dtypes.append(output.dtype)

    words = ["--threads", "1", "--quiet"]
    with torch.nn.modules.module.register_module_forward_hook(record):
        for classify in (
            lambda: lab.predict(directory, copied),
            lambda: predict.main([str(copied), str(directory), *words]),
            lambda: evaluate.main([str(copied), *words]),
        ):
            dtypes.clear()
            classify()
            assert set(dtypes) == {torch.bfloat16}


def test_unreadable_files_in_a_directory_are_reported_and_left_out(
    finished, images, tmp_path, capsys
):
    write_images(images, tmp_path)
    expected = lab.predict(tmp_path, finished)
    assert expected.errors == {}
    for i in (0, 4, 5):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
    prediction = lab.predict(tmp_path, finished, batch_size=2)  # the third batch is empty
    rest = [1, 2, 3, 6, 7, 8]
    assert prediction.paths == [str(tmp_path / f"{i}.png") for i in rest]
    torch.testing.assert_close(prediction.probabilities, expected.probabilities[rest])
    assert prediction.names == [expected.names[i] for i in rest]
    assert list(prediction.errors) == [str(tmp_path / f"{i}.png") for i in (0, 4, 5)]
    warnings = [f"warning: {text}" for text in prediction.errors.values()]
    assert capsys.readouterr().err.splitlines() == warnings
    assert all("cannot read the image" in text for text in warnings)
    for path in tmp_path.iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="none of the images can be read: cannot read the image"):
        lab.predict(tmp_path, finished)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("missing.png", "there is no file missing.png"),
        (torch.zeros(0, 1, 28, 28, dtype=torch.uint8), "there are no images to classify"),
        (torch.zeros(2, 1, 32, 32), "images are float32 [2, 1, 32, 32]. Give uint8"),
        (np.zeros((28, 28), dtype=np.uint8), "images are uint8 [28, 28]. Give uint8"),
        ([torch.zeros(1, 28, 28)], "images are a list of arrays. Stack them"),
        ({1, 2}, "images are of type set. Give uint8"),
        (None, "images are of type NoneType. Give uint8"),
        (["missing.png", Image.new("L", (9, 9))], "images are both paths and Pillow images"),
        (__file__, "cannot read the image"),
        ([Image.new("L", (9, 9)), Image.new("La", (9, 9))], "cannot read image 1 (conversion"),
    ],
)
def test_p7_predict_refuses(finished, images, message):
    with pytest.raises(UserError) as raised:
        lab.predict(images, finished)
    assert str(raised.value).startswith(message)


def test_train_main_returns_the_run_also_if_it_is_interrupted(tmp_path, monkeypatch):
    words = [*SMALL, "--output-dir", str(tmp_path), "--epochs", "3"]
    run = train.main([*words, "--name", "run"])
    assert (run.path, run.exit_code) == (tmp_path / "run", 0)
    report = json.loads((run.path / "report.json").read_text())
    assert report["num_samples"] == 100

    # Ctrl-C in a notebook: the run has no report, and resuming it gives the same result.
    epoch_row = train.console.epoch_row

    def interrupt(*arguments):
        epoch_row(*arguments)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.console, "epoch_row", interrupt)
        stopped = train.main([*words, "--name", "stopped"])
    assert (stopped.path, stopped.exit_code) == (tmp_path / "stopped", 130)
    assert not (stopped.path / "report.json").exists()
    assert train.main(["--resume", str(stopped.path), "--quiet"]).exit_code == 0
    assert json.loads((stopped.path / "report.json").read_text()) == report
    assert stopped.best.read_bytes() == run.best.read_bytes()


def test_the_python_code_in_the_readme_works(tmp_path, monkeypatch, images, capsys):
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert "train.main(" in code
    [directory] = re.findall(r'lab\.predict\("([^"]+)"', code)
    monkeypatch.chdir(tmp_path)
    write_images(images, tmp_path / directory)
    exec(code, {})
    assert "tensor([[" in capsys.readouterr().out


WITHOUT_THE_CHECKOUT = """
import sys
sys.path.insert(0, sys.argv[1])
import lab
assert "torch" not in sys.modules
assert lab.__file__.startswith(sys.argv[1]), lab.__file__
prediction = lab.predict(sys.argv[3], lab.load_model(sys.argv[2], "cpu"))
print(*prediction.names)
slow_imports = {"torchvision", "torch._dynamo", "torch._inductor"}  # LeNet-5 needs none of them
assert not slow_imports & {*sys.modules}, slow_imports & {*sys.modules}
"""


@pytest.mark.slow
def test_a_wheel_offers_load_model_and_predict(finished, images, tmp_path):
    """It is built without network, and unpacked beside the packages of this environment."""
    [path] = write_images(images[:1], tmp_path / "images")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "lab", source / "lab")  # setuptools would write to the checkout
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, source], check=True)
    [wheel] = tmp_path.glob("lab-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
    command = [sys.executable, "-I", "-c", WITHOUT_THE_CHECKOUT, installed, finished, path]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == lab.predict(path, finished).names


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        ([["0.png"]], {}, "images contain an object of type list. Give paths."),
        (Image.new("RGB", (0, 5)), {}, r"cannot read image 0 \(it has no pixels\). Replace it."),
        ("0.png", {"weights": [1]}, "weights contain an object of type list. Give paths."),
    ],
)
def test_p7_what_cannot_be_classified_is_named(finished, images, settings, message):
    with pytest.raises(UserError, match=message):
        lab.predict(images, **{"weights": finished} | settings)


def test_p7_a_device_that_is_not_there_is_named(finished):
    with pytest.raises(UserError, match=r"cannot use the device gpu \(.*\)\. Give auto or cpu\."):
        lab.load_model(finished, device="gpu")
