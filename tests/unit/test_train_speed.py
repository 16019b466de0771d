"""benchmarks/train_speed.py: the plain loop that lab is compared with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms import functional as T

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
    case = contenders.Case("lenet5", folder, "data")
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
    images, _ = contenders.load_images(case.sets()[0], torch.device("cpu"))
    assert sorted(map(hash_of, images)) == sorted(map(hash_of, torch.cat(seen)))  # each one once
    assert not torch.equal(images, torch.cat(seen))  # shuffled
    assert train(2) == 256


def hash_of(image):
    return image.numpy().tobytes()


def test_the_plain_loop_augments_as_the_notebooks_transforms_do(benchmark):
    contenders, *_ = benchmark
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, 32, 32), dtype=torch.uint8)
    padded = T.pad(image, [4])
    possible = {}
    for top in range(9):
        for left in range(9):
            crop = T.crop(padded, top, left, 32, 32)
            possible[hash_of(crop)] = (top, left, False)
            possible[hash_of(T.hflip(crop).contiguous())] = (top, left, True)
    drawn = contenders.crop_and_flip(image.expand(2000, -1, -1, -1)).contiguous()
    assert {possible[hash_of(crop)] for crop in drawn} == set(possible.values())


@pytest.mark.parametrize("model", ["lenet5", "alexnet"])
def test_the_plain_loop_has_labs_precision_and_memory_format(benchmark, monkeypatch, model):
    contenders, _, folder = benchmark
    from lab import distributed

    monkeypatch.setattr(distributed, "has_native_bf16", lambda device_type: True)
    monkeypatch.setattr(contenders, "BATCH_SIZE", 4)
    models, logits, build = [], [], contenders.Case.make_model

    def make_model(case):
        models.append(build(case))
        models[-1].register_forward_hook(lambda *args: logits.append(args[-1].dtype))
        return models[-1]

    monkeypatch.setattr(contenders.Case, "make_model", make_model)
    case = contenders.Case(model, folder, "data")
    for name in ("resident", "resident-float32"):
        contenders.CONTENDERS[name](case)[0](1)
    with_channels_last = [
        any(
            p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
            for p in built_model.parameters()
            if p.ndim == 4 and p.shape[1] > 1
        )
        for built_model in models
    ]
    large = model == "alexnet"
    assert logits == [torch.bfloat16 if large else torch.float32, torch.float32]
    assert with_channels_last == [large, False]


def test_the_parts_of_a_gain_are_ratios_whose_product_is_all_of_it(benchmark):
    _, train_speed, _ = benchmark
    seconds = {"notebook": 12.0, "resident-float32": 6.0, "resident": 3.0, "lab": 2.0}
    results = {
        name: [{"train_seconds": value, "eval_seconds": value}] for name, value in seconds.items()
    }
    lines = train_speed.parts_table(results)
    found = [float(line.split("|")[2].split()[0]) for line in lines[3:]]
    assert found == [2.0, 2.0, 1.5, 6.0]
    del results["resident"]
    assert train_speed.parts_table(results) == []


@pytest.mark.slow
def test_the_speed_benchmark_runs_through_on_random_images(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/train_speed.py", "--quick", "--rounds", "1"]
    command += ["--json", tmp_path / "speed.json"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "| bfloat16 and channels_last |" in found.stdout
    [results] = json.loads((tmp_path / "speed.json").read_text())["cases"].values()
    assert set(results) >= {"notebook", "resident-float32", "resident", "lab", "floor"}
