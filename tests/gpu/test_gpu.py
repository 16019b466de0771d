"""On a GPU: steps do not wait and give the CPU's results; data and weights are on the device."""

import gc
import json
import math

import pytest
import torch
import torch.nn.functional as F
from trainers import (
    CROPS,
    UNUSUAL,
    VARIANTS,
    make_loader,
    make_train_step,
    place,
    prepare,
    train,
    weights,
)

import evaluate as evaluate_script
import train as train_script
from lab.checkpoint import weights as weights_module
from lab.config.schema import TrainConfig
from lab.cuda_graph import NUM_WARMUP_CALLS
from lab.data.digits import load_digits
from lab.data.loaders import ResidentLoader
from lab.data.sampler import ShardedBatchSampler, random_bits
from lab.data.transforms import BatchTransform
from lab.data.types import Batch, Split
from lab.distributed import choose_precision
from lab.engine.evaluation import predict_all
from lab.engine.training import seed_dropout
from lab.errors import UserError
from lab.models import MODELS, build_model

MUON = {"optimizer": "muon", "lr": 1e-3}


def gpu(test):
    """Mark a test that needs a CUDA device."""
    missing = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(test))


def large_digits():
    """Return the bundled digits, enlarged three times to uint8 [1797, 1, 28, 28], and labels."""
    images, labels = load_digits()
    return F.pad(images.repeat_interleave(3, 2).repeat_interleave(3, 3), (2, 2, 2, 2)), labels


@gpu
@pytest.mark.parametrize("settings", VARIANTS, ids=["sgd", "unusual", "adamw", "weights"])
@pytest.mark.parametrize(("model", "precision"), [("lenet5", "no"), ("alexnet", "bf16")])
def test_a_step_never_waits_for_the_gpu(model, precision, settings):
    cuda = place("cuda", precision)
    class_weights = settings.get("class_weights", "none")
    loader = make_loader(cuda, model, num_samples=65, class_weights=class_weights)
    train_step = make_train_step(cuda, model, batch_size=8, **settings)
    train(train_step, loader)  # cuDNN selects kernels

    def watch(step, *_):  # the start and the end of an epoch may wait
        torch.cuda.set_sync_debug_mode("error" if step < 9 else "default")

    try:
        train(train_step, loader, on_step=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("augment", ["crop", "flip", "cutout", "crop,flip,cutout"])
def test_p2_random_bits_and_augmentation_equal_the_cpus(augment):
    images = large_digits()[0]
    results = []
    for device in ("cpu", "cuda"):
        pixels, bits = images.to(device), random_bits(5, 3, len(images), device)
        transform = BatchTransform((0.0,), (1 / 255,), augment.split(","), device)
        results.append((bits.cpu(), transform(pixels, bits).cpu()))
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)
    assert not torch.equal(results[0][1], images.float())


@gpu
def test_p2_the_gpu_follows_the_cpus_curve():
    curves = []
    for device in ("cpu", "cuda"):
        accelerator = place(device)
        images, labels = large_digits()
        split = Split(images, labels, tuple("0123456789"))
        transform = BatchTransform((0.3,), (0.4,), ("crop", "cutout"), accelerator.device)
        sampler = ShardedBatchSampler(len(labels), 64, 0, 0, 1)
        loader = ResidentLoader(split, sampler, transform, accelerator.device)
        settings = {"batch_size": 64, "max_steps": 10, "log_every": 1, **UNUSUAL}
        rows = []
        train(make_train_step(accelerator, **settings), loader, on_log=rows.append)
        curves.append([row["loss"] for row in rows])
    assert len(curves[0]) == 10
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)


@gpu
@pytest.mark.parametrize("num_samples", [1, 31, 32, 33])
def test_p1_each_sample_is_evaluated_once_on_a_gpu(num_samples):
    cuda = place("cuda")
    loader = make_loader(cuda, num_samples=num_samples, seed=None)
    predictions = predict_all(cuda, make_train_step(cuda).eval_model, loader)
    assert predictions.labels.tolist() == [i % 10 for i in range(num_samples)]
    matrix = predictions.report()["confusion_matrix"]
    assert sum(map(sum, matrix)) == num_samples
    assert all(math.isfinite(x) for x in predictions.losses.tolist())


@gpu
def test_data_weights_and_optimizer_are_on_the_gpu():
    cuda = place("cuda")
    loader, train_step = make_loader(cuda), make_train_step(cuda, ema_decay=0.9, optimizer="adamw")
    train(train_step, loader)
    assert loader.images.is_cuda
    assert loader.images.dtype == torch.uint8
    assert all(x.is_cuda for x in next(loader.batches(1)).__dict__.values() if torch.is_tensor(x))
    assert all(
        p.is_cuda for p in [*train_step.model.parameters(), *train_step.eval_model.parameters()]
    )
    assert all(group["fused"] for group in train_step.optimizer.param_groups)
    tensors = [
        t for s in train_step.optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    ]
    assert tensors
    assert all(t.is_cuda for t in tensors)


@gpu
def test_an_epoch_leaves_no_memory_behind():
    cuda = place("cuda")
    loader, train_step = make_loader(cuda), make_train_step(cuda)
    train(train_step, loader, epochs=4)  # the fourth captures the smaller last batch
    gc.collect()  # models of earlier tests
    before = torch.cuda.memory_allocated()
    train(train_step, loader, epochs=3)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert all(p.grad is None for p in train_step.model.parameters())


@gpu
@pytest.mark.parametrize("augment", [CROPS, (*CROPS, "mixup", "cutmix")])
@pytest.mark.parametrize("settings", [*VARIANTS, MUON, {"grad_accum_steps": 3}])
def test_p2_replayed_steps_are_the_same_as_single_kernels(augment, settings):
    cuda, curves, ends = place("cuda"), [], []
    for graphs in ("never", "auto"):
        loader = make_loader(
            cuda, "alexnet", 37, augment=augment, graphs=graphs == "auto",
            class_weights=settings.get("class_weights", "none"),
        )  # fmt: skip
        train_step = make_train_step(cuda, "alexnet", cuda_graphs=graphs, log_every=1, **settings)
        rows = []
        train(train_step, loader, epochs=4, on_log=rows.append)
        curves.append([row["loss"] for row in rows])
        ends.append(weights(train_step.eval_model))
    assert train_step.graph_runner.graphs
    assert len(set(curves[0])) == len(curves[0]) == 20
    if settings is MUON:  # its iterations magnify rounding differences
        assert curves[1] == pytest.approx(curves[0], rel=2e-3)
    else:
        assert curves[1] == pytest.approx(curves[0], rel=1e-4)
        # AdamW moves a weight whose gradient is a rounding error by up to the learning rate, 1e-3.
        assert torch.allclose(*ends, atol=5e-3)


@gpu
@pytest.mark.parametrize("model", [*MODELS, "torchvision:resnet18", "torchvision:swin_t"])
def test_p2_each_model_can_be_captured(model):
    cuda, curves = place("cuda", "bf16"), []
    size = 64 if model.startswith("torchvision") else 32
    images, labels = torch.randn(8, 3, size, size, device="cuda"), torch.arange(8, device="cuda")
    for graphs in ("never", "auto"):
        torch.manual_seed(0)
        built_model = build_model(model, num_classes=10, in_chans=3, image_size=size)
        settings = {"model": model, "dataset": "cifar10", "optimizer": "adamw", "lr": 1e-4}
        train_step = prepare(cuda, built_model, TrainConfig(**settings, cuda_graphs=graphs))
        train_step.set_training_mode()
        losses = []
        for step in range(6):
            seed_dropout(step, cuda.device)
            losses.append(train_step(Batch(images, labels, labels, 8))[0])
        curves.append(torch.stack(losses).tolist())
    assert len(train_step.graph_runner.graphs) == 1
    # On a CPU, rounding the first weights to other bfloat16 values changes the losses by up to 8 %.
    assert curves[1] == pytest.approx(curves[0], rel=0.1)
    assert curves[1][-1] < curves[1][0]


@gpu
def test_p7_a_model_that_reads_its_outputs_is_an_error_with_a_hint():
    class ReadsOutputs(torch.nn.Linear):
        def forward(self, images):
            logits = super().forward(images.flatten(1))
            return logits if logits.sum().item() else -logits

    cuda = place("cuda")
    train_step = prepare(cuda, ReadsOutputs(784, 10), TrainConfig(dataset="digits"))
    labels = torch.arange(4, device="cuda")
    batch = Batch(torch.randn(4, 1, 28, 28, device="cuda"), labels, labels, 4)
    for _ in range(NUM_WARMUP_CALLS):
        train_step(batch)
    with pytest.raises(UserError, match="cannot be captured") as error:
        train_step(batch)
    assert error.value.hint == "Give --cuda-graphs never"


@gpu
def test_bfloat16_is_chosen_for_large_models():
    modern = torch.cuda.get_device_capability() >= (8, 0)
    assert choose_precision("auto", "cuda", benefits_from_bf16=True) == ("bf16" if modern else "no")
    assert choose_precision("auto", "cuda", benefits_from_bf16=False) == "no"


@gpu
def test_p5_weights_from_a_gpu_are_read_on_a_cpu(tmp_path):
    place("cuda")  # replaces a CPU that other tests selected
    common = ["--dataset", "digits", "--recipe", "smoke", "--quiet", "--ema-decay", "0.9"]
    common += ["--name", "run"]
    train_script.main([*common, "--output-dir", str(tmp_path)])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["device"] == "cuda"
    path = weights_module.find_weights(str(tmp_path / "run"))
    metadata = weights_module.read_metadata(path)
    model = build_model(**metadata["model"])
    weights_module.load_weights(path, model)
    assert all(not p.is_cuda and p.isfinite().all() for p in model.parameters())


@gpu
def test_p1_evaluate_repeats_what_train_predicted(tmp_path):
    place("cuda")
    common = ["--dataset", "digits", "--recipe", "smoke", "--model", "alexnet"]
    common += ["--max-eval-samples", "0"]
    train_script.main([*common, "--quiet", "--name", "run", "--output-dir", str(tmp_path)])
    evaluate_script.main([str(tmp_path / "run"), "--quiet"])
    results = [*tmp_path.rglob("predictions.csv")]
    assert len(results) == 2
    assert results[0].read_bytes() == results[1].read_bytes()


@gpu
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")], ids="->".join)
def test_p3_a_run_resumes_on_another_device(tmp_path, monkeypatch, devices):
    common = ["--dataset", "digits", "--recipe", "smoke", "--name", "run", "--ema-decay", "0.9"]
    begin = [*common, "--output-dir", str(tmp_path), "--log-every", "1", "--max-steps", "7"]
    for device, argv in zip(
        devices, (begin, ["--resume", str(tmp_path / "run"), "--max-steps", "14"]), strict=True
    ):
        place(device)  # replaces the previous device
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
        train_script.main([*argv, "--quiet"])
        assert json.loads((tmp_path / "run" / "config.json").read_text())["device"] == device
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 15))
