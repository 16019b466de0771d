"""The optimizers, their parameter groups, and the learning-rate schedules."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from lab.checkpoint.train_state import optimizer_state_shapes
from lab.config.recipes import resolve
from lab.config.schema import TrainConfig
from lab.engine import muon
from lab.engine.lr_schedule import learning_rate
from lab.engine.muon import Muon, muon_parameters, zeropower_via_newtonschulz
from lab.engine.optimizer import build_optimizer, layer_scales, set_learning_rate
from lab.models import build_model


def rates(config, steps_per_epoch, extra=0):
    num_steps = config.epochs * steps_per_epoch + extra
    return [learning_rate(config, step, steps_per_epoch) for step in range(num_steps)]


@pytest.mark.parametrize("model", ["lenet5", "alexnet"])
@pytest.mark.parametrize("steps_per_epoch", [1, 391])
def test_the_notebook_rate_is_torchs_step_schedule(model, steps_per_epoch):
    config = resolve({"model": model, "recipe": "notebook", "epochs": 25})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = StepLR(optimizer, step_size=config.lr_step_epochs, gamma=config.lr_gamma)
    expected = []
    for _ in range(config.epochs):
        expected += [optimizer.param_groups[0]["lr"]] * steps_per_epoch
        optimizer.step()
        scheduler.step()
    assert rates(config, steps_per_epoch) == pytest.approx(expected, rel=1e-12)


def test_cosine_is_a_cosine_and_linear_is_a_line():
    cosine = rates(TrainConfig(schedule="cosine", lr=2.0, epochs=5), 9)
    expected = [1 + math.cos(math.pi * step / 45) for step in range(45)]
    assert cosine == pytest.approx(expected, rel=1e-12)
    line = rates(TrainConfig(schedule="linear", lr=2.0, epochs=5), 9)
    assert line == pytest.approx([2 * (1 - step / 45) for step in range(45)], rel=1e-12)


@pytest.mark.parametrize("warmup", [0.5, 2.3])
@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "linear"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule, warmup):
    config = TrainConfig(schedule=schedule, lr=0.4, epochs=6, warmup_epochs=warmup)
    steps_per_epoch = 10
    lrs = rates(config, steps_per_epoch)
    num_rising = round(warmup * steps_per_epoch)
    rises = [b - a for a, b in zip([0.0, *lrs], lrs[: num_rising + 1], strict=False)]
    assert rises == pytest.approx([0.4 / (num_rising + 1)] * (num_rising + 1))
    assert lrs[num_rising] == max(lrs) == pytest.approx(0.4)


def test_p2_the_rate_depends_on_the_step_only():
    config = TrainConfig(schedule="linear", epochs=5, warmup_epochs=1)
    forwards = rates(config, 13)
    backwards = [learning_rate(config, step, 13) for step in reversed(range(65))]
    assert forwards == backwards[::-1]
    limited = TrainConfig(schedule="linear", epochs=5, warmup_epochs=1, max_steps=20)
    assert rates(limited, 13) == forwards


def make_model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_biases_and_normalization_have_no_weight_decay_by_default(optimizer):
    model = make_model()
    settings = {"optimizer": optimizer, "weight_decay": 0.1}
    optimizer = build_optimizer(model, TrainConfig(**settings))
    weights = {id(model[0].weight), id(model[3].weight)}
    everything = {id(p) for p in model.parameters()}
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    assert groups == {0.1: weights, 0.0: everything - weights}
    optimizer = build_optimizer(model, TrainConfig(decay_biases=True, **settings))
    assert [{id(p) for p in g["params"]} for g in optimizer.param_groups] == [everything]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(("name", "kind", "expected"), [
    ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
    ("nesterov", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.999)}),
])  # fmt: skip
def test_the_named_optimizer_is_built_fused(name, kind, expected):
    optimizer = build_optimizer(make_model(), TrainConfig(optimizer=name, momentum=0.8, lr=0.3))
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert expected.items() <= group.items()
        assert (group["lr"], group["fused"]) == (0.3, True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_follows_its_formula(momentum):
    """v = momentum * v + grad + decay * weight; weight -= lr * v; two steps of gradient 1."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    config = TrainConfig(optimizer="sgd", lr=0.1, momentum=momentum, weight_decay=0.01)
    optimizer = build_optimizer(layer, config)
    weight, velocity = 2.0, 0.0
    for _ in range(2):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
        velocity = momentum * velocity + 1 + 0.01 * weight
        weight -= 0.1 * velocity
    assert layer.weight.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize(("bfloat16", "tolerance"), [(True, 0.05), (False, 1e-4)])
@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_muons_update_is_nearly_orthogonal(shape, bfloat16, tolerance, monkeypatch):
    """The singular vectors do not change, and the singular values are close to 1."""
    monkeypatch.setattr(muon, "has_native_bf16", lambda device_type: bfloat16)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    update = zeropower_via_newtonschulz(matrix)
    assert update.dtype == matrix.dtype
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ update @ right.T
    assert values.diag().min() > 0.6
    assert values.diag().max() < 1.3
    assert (values - values.diag().diag()).abs().max() < tolerance
    assert zeropower_via_newtonschulz(torch.zeros(shape)).eq(0).all()
    # Of singular values that differ by a factor of 100, too.
    assert zeropower_via_newtonschulz(torch.tensor([1, 0.1, 0.01]).diag()).diag().min() > 0.6


def test_muon_updates_the_layers_between_the_first_and_the_last():
    model = build_model("alexnet", num_classes=10, in_chans=3, image_size=32)
    names = {n for n, p in model.named_parameters() if p in muon_parameters(model)}
    # The dense layers are too wide, at 2,048.
    assert names == {f"features.{n}.weight" for n in (3, 6, 8, 10)}
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", lr=0.1, momentum=0.8))
    assert type(optimizer) is Muon
    assert all(group["fused"] for group in optimizer.param_groups)
    groups = optimizer.param_groups
    assert [(g["muon"], g["weight_decay"]) for g in groups] == [
        (False, 5e-4), (True, 5e-4), (False, 0.0)
    ]  # fmt: skip
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    model.features[6].weight.requires_grad_(False)  # frozen
    assert model.features[6].weight not in muon_parameters(model)


def test_muon_follows_its_formula_and_adamw_steps_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    config = TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.5, decay_biases=True)
    optimizer = build_optimizer(model, config)
    hidden, other = model[1].weight, model[0].weight
    expected, buffer = hidden.detach().clone(), torch.zeros_like(hidden)
    beside = nn.Parameter(other.detach().clone())
    adamw = torch.optim.AdamW([beside], lr=0.1, betas=(0.9, 0.999), weight_decay=0.5)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        beside.grad = other.grad.clone()
        buffer = 0.95 * buffer + 0.05 * hidden.grad
        update = zeropower_via_newtonschulz(
            (0.05 * hidden.grad + 0.95 * buffer).flatten(1)
        ).view_as(hidden)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 36**0.5 * update
        optimizer.step()
        adamw.step()
    assert torch.allclose(hidden, expected, atol=1e-2)  # bfloat16
    assert torch.allclose(other, beside, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "muon"])
def test_optimizer_state_shapes_are_those_of_the_optimizer(name):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    optimizer = build_optimizer(model, TrainConfig(optimizer=name))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    shapes = {p: {k: v.shape for k, v in state.items()} for p, state in optimizer.state.items()}
    assert shapes == optimizer_state_shapes(optimizer)


def test_the_last_norm_of_a_transformer_is_a_block_of_its_own():
    model = build_model("vit_tiny", num_classes=3, in_chans=3, image_size=32)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {names[p]: scale for scale, ps in layer_scales(model, 0.5).items() for p in ps}
    assert [scale for name, scale in scales.items() if ".ln." in name] == [0.5, 0.5]
    assert {scale for name, scale in scales.items() if "encoder_layer_11." in name} == {0.25}


@pytest.mark.parametrize("optimizer", ["muon", "nesterov"])
def test_earlier_blocks_have_lower_learning_rates(optimizer):
    model = build_model("torchvision:resnet18", num_classes=3, in_chans=3, image_size=32)
    model.bn1.requires_grad_(False)
    scales = layer_scales(model, 0.5)
    assert list(scales) == [2.0**-i for i in (5, 4, 3, 2, 1, 0)]  # conv1, layer1 to layer4, fc
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in scales[1.0]] == ["fc.weight", "fc.bias"]
    assert {names[p].split(".")[0] for p in scales[0.5]} == {"layer4"}
    config = TrainConfig(optimizer=optimizer, lr=0.1, layer_decay=0.5)
    built = build_optimizer(model, config)
    set_learning_rate(built, 0.8)
    rates = {p: group["lr"] for group in built.param_groups for p in group["params"]}
    assert rates.keys() == {p for p in model.parameters() if p.requires_grad}
    for scale, parameters in scales.items():
        assert {rates[p] for p in parameters} == {0.8 * scale}
    before = model.layer1[0].conv1.weight.clone(), model.fc.weight.clone()
    model(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    built.step()
    assert not torch.equal(before[0], model.layer1[0].conv1.weight)
    assert not torch.equal(before[1], model.fc.weight)
