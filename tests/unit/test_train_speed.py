"""benchmarks/train_speed.py: the plain loop that lab is compared with."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Yield contenders, train_speed, and a directory of random images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import contenders
        import train_speed

        patch.setattr(contenders, "WORKERS", 0)
        folder = tmp_path_factory.mktemp("images")
        train_speed.write_random_images(folder, 300, 50)
        yield contenders, train_speed, str(folder)


def test_the_plain_loop_measures_and_trains_as_the_notebooks_loop_does(benchmark, monkeypatch):
    contenders, _, folder = benchmark
    case = contenders.Case("lenet5", folder)
    seen, logits = [], []
    build = contenders.Case.make_model

    def make_model(case):
        model = build(case)
        model.register_forward_hook(lambda *args: logits.append(args[-1].detach()))
        return model

    def see(images):
        seen.append(images)
        return images

    monkeypatch.setattr(contenders.Case, "make_model", make_model)
    monkeypatch.setattr(contenders, "crop_and_flip", see)
    train, evaluate = contenders.resident(case)
    assert evaluate() == contenders.notebook(case)[1]()
    torch.testing.assert_close(*logits)
    assert train(None) == 300
    assert [len(images) for images in seen] == [128, 128, 44]
    images, _ = contenders.load_images(case.sets()[0], 32, torch.device("cpu"))
    assert sorted(map(hash_of, images)) == sorted(map(hash_of, torch.cat(seen)))  # each one once
    assert not torch.equal(images, torch.cat(seen))  # shuffled
    assert train(2) == 256


def hash_of(image):
    return image.numpy().tobytes()


@pytest.mark.slow
def test_the_speed_benchmark_runs_through_on_random_images(
    benchmark, tmp_path, monkeypatch, capsys
):
    """In this process: each of its own would import PyTorch again."""
    _, train_speed, _ = benchmark

    def main(*words):
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        train_speed.main()
        return capsys.readouterr().out

    monkeypatch.setattr(
        train_speed, "child", lambda *words: json.loads(main(*words).splitlines()[-1])
    )
    words = ("--quick", "--rounds", 1, "--contenders", "resident,lab,floor", "--json")
    text = main("train_speed.py", *words, tmp_path / "speed.json")
    [results] = json.loads((tmp_path / "speed.json").read_text())["cases"].values()
    assert set(results) == {"resident", "lab", "floor"}
    assert re.search(r"^\| floor \| \d+\.\d\d \(.*\) \| - \| - \|$", text, re.MULTILINE)
