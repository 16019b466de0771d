"""lab from Python: train.py's and predict.py's answers, with UserError for what went wrong."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lab
import predict
from lab import inference
from lab.checkpoint import weights
from lab.config.cli import as_keywords, words_of
from lab.config.schema import TrainConfig
from lab.data import DataConfig, load_split
from lab.errors import UserError

SMALL = {
    "dataset": "digits",
    "recipe": "smoke",
    "threads": 1,
    "quiet": True,
    "max_train_samples": 64,
}


@pytest.fixture(scope="module")
def images(finished):
    """Digits uint8 [9, 1, 32, 32]."""
    metadata = weights.read_metadata(finished / "best.safetensors")
    return load_split(DataConfig(**metadata["data"]), "test", 1e9, 1)[0].images[:9]


def test_every_form_of_picture_gives_the_answer_of_predict_py(finished, images, tmp_path):
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    table = tmp_path / "out.csv"
    words = [finished, tmp_path, "--csv", table, "--top-k", 1, "--threads", 1, "--workers", 0]
    predict.main([str(word) for word in words])
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    loaded = lab.load_model(finished)
    files = [tmp_path, paths, [str(path) for path in paths], [Image.open(path) for path in paths]]
    arrays = [images, images.numpy(), images.expand(-1, 3, -1, -1)]
    for pictures in files + arrays:
        found = lab.predict(pictures, loaded, batch_size=4)
        assert found.names == [row["class1"] for row in rows]
        assert found.names == [found.class_names[k] for k in found.labels]
        confidence = [float(row["confidence1"]) for row in rows]
        # A grey file becomes RGB and grey again, which may take one of 255 off a pixel.
        tolerance = 1e-2 if pictures is images or pictures is arrays[1] else 1e-5
        highest = found.probabilities.max(1).values
        assert highest.tolist() == pytest.approx(confidence, abs=tolerance)
        assert found.probabilities.shape == (9, 10)
    assert lab.predict(tmp_path, loaded).paths == [str(path) for path in paths]
    assert lab.predict(images, finished / "best.safetensors").paths == []
    one = lab.predict(str(paths[0]), finished)
    assert one.names == [rows[0]["class1"]]


def test_what_cannot_be_read_in_a_folder_is_named_and_the_rest_predicted(
    finished, images, tmp_path, capsys
):
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    expected = lab.predict(tmp_path, finished)
    assert expected.errors == {}
    for i in (0, 4, 5):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    found = lab.predict(tmp_path, finished, batch_size=2)  # the third batch has nothing left
    rest = [1, 2, 3, 6, 7, 8]
    assert found.paths == [str(tmp_path / f"{i}.png") for i in rest]
    torch.testing.assert_close(found.probabilities, expected.probabilities[rest])
    assert found.names == [expected.names[i] for i in rest]
    assert list(found.errors) == [str(tmp_path / f"{i}.png") for i in (0, 4, 5)]
    warnings = [f"warning: {text}" for text in found.errors.values()]
    assert capsys.readouterr().err.splitlines() == warnings
    assert all("in no known format" in text for text in warnings)
    for path in tmp_path.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the pictures can be read: cannot read the"):
        lab.predict(tmp_path, finished)


def test_pictures_are_cut_to_their_central_square(finished, images):
    wide = torch.zeros(9, 1, 64, 80, dtype=torch.uint8)
    wide[:, :, :, 8:72] = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    model = lab.load_model(str(finished), "cpu")
    expected = lab.predict(images, model).probabilities
    # Enlarged, then made small again by a filter that blurs a little.
    torch.testing.assert_close(lab.predict(wide, model).probabilities, expected, atol=0.2, rtol=0)


def test_predict_leaves_a_network_in_training_as_it_was(finished, images):
    model, metadata = lab.load_model(finished)
    assert not model.training
    logits = model((images / 255 - torch.tensor(metadata["mean"])) / torch.tensor(metadata["std"]))
    model.train()
    found = lab.predict(images, (model, metadata))
    assert model.training
    torch.testing.assert_close(found.probabilities, logits.softmax(1))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "there are no pictures to classify"),
        ("gone.png", "there is no file gone.png"),
        (torch.zeros(0, 1, 28, 28, dtype=torch.uint8), "there are no pictures to classify"),
        (torch.zeros(2, 1, 32, 32), "pictures are float32 [2, 1, 32, 32]. Give uint8"),
        (np.zeros((28, 28), dtype=np.uint8), "pictures are uint8 [28, 28]. Give uint8"),
        (torch.zeros(2, 28, 28, 3, dtype=torch.uint8), "pictures are uint8 [2, 28, 28, 3]"),
        ([torch.zeros(1, 28, 28)], "pictures are a list of arrays. Stack them"),
        (["gone.png", Image.new("L", (9, 9))], "pictures mix paths and images"),
        (__file__, "cannot read the picture"),
    ],
)
def test_p7_predict_refuses(finished, pictures, message):
    with pytest.raises(UserError) as raised:
        lab.predict(pictures, finished)
    assert str(raised.value).startswith(message)


def test_train_gives_the_run_and_its_report(tmp_path, monkeypatch):
    run = lab.train(SMALL, output_dir=tmp_path, name="run", epochs=3, max_train_samples=None)
    assert run.path == tmp_path / "run"
    assert run.weights.is_file()
    assert run.report["num_samples"] == 100
    whole = run.weights.read_bytes()

    # Ctrl-C in a notebook: a run without a report, which goes on to the same end.
    script = inference._script()
    epoch = script.console.epoch_row

    def interrupt(*words):
        epoch(*words)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(script.console, "epoch_row", interrupt)
        stopped = lab.train(TrainConfig(**{**config_of(run), "name": "stopped"}))
    assert stopped.path == tmp_path / "stopped"
    assert stopped.report is None
    assert lab.train(resume=str(stopped.path), quiet=True).report == run.report
    assert stopped.weights.read_bytes() == whole


def config_of(run):
    saved = json.loads((run.path / "config.json").read_text())
    return {name: saved[name] for name in TrainConfig.__dataclass_fields__}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "there is no setting epoch. Did you mean epochs?"),
        ({"help": True}, "there is no setting help. Known: model, "),
        ({"quiet": "no"}, "quiet is 'no'. Give True or False."),
        ({"epochs": "many"}, "argument epochs: invalid int value: 'many'. See"),
        ({"epochs": 0}, "epochs 0 is too low. Give at least 1."),
        ({"model": "lenet"}, "there is no model lenet. Did you mean lenet5 or "),
        ({"dataset": "folder", "data_dir": "gone"}, "there is no folder gone. "),
    ],
)
def test_p7_train_refuses(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        lab.train(SMALL, **settings)
    assert str(raised.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_p7_what_the_scripts_explain_is_explained(monkeypatch):
    def fails(given):
        raise MemoryError

    monkeypatch.setattr(inference._script(), "train", fails)
    with pytest.raises(UserError, match="out of memory"):
        lab.train(SMALL)


def test_p7_a_package_without_its_checkout_says_so(monkeypatch, tmp_path):
    inference._script.cache_clear()
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "site" / "lab" / "__init__.py"))
    with pytest.raises(UserError, match=r"there is no .*train\.py\. Install lab from a checkout"):
        lab.train(SMALL)


def test_switches_can_be_turned_off_where_something_may_have_turned_them_on():
    settings = {"deterministic": False, "overwrite": False, "quiet": True, "name": None, "lr": 0.1}
    assert words_of(TrainConfig, settings) == ["--no-deterministic", "--quiet", "--lr=0.1"]


def test_messages_speak_of_what_python_is_given():
    for text, expected in {
        "Give another --name, or --overwrite to replace it": "Give another name, or overwrite=True "
        "to replace it",
        "--batch-size 0 is too low": "batch_size 0 is too low",
        "Finish it: train.py --resume runs/x": "Finish it: train.py --resume runs/x",
        "See `python train.py --help`": "See `python train.py --help`",
    }.items():
        assert as_keywords(TrainConfig, text) == expected


def test_what_the_package_offers_is_there():
    assert set(lab.__all__) <= set(dir(lab))
    assert all(callable(getattr(lab, name)) for name in lab.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lab.nothing  # noqa: B018


def test_the_code_in_readme_works(tmp_path, monkeypatch, images, capsys):
    readme = (Path(lab.__file__).parents[1] / "README.md").read_text()
    code = readme.split("```python\n", 1)[1].split("```", 1)[0]
    assert code.startswith("import lab")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PICTURES").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "PICTURES" / f"{i}.png")
    exec(code.replace("epochs=3", "epochs=1, **SMALL"), {"SMALL": {"threads": 1, "quiet": True}})
    printed = capsys.readouterr().out
    assert "tensor([[" in printed
