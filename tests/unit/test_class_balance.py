"""Class weights, balanced sampling and warnings; P2: exact on any number of processes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainers import FakeWorld, prepare

from lab.config.schema import TrainConfig
from lab.data.loaders import LoaderOptions, build_loader
from lab.data.sampler import balanced_class_weights, balanced_permutation
from lab.data.splits import Splits
from lab.data.transforms import BatchTransform
from lab.data.types import Split
from lab.distributed import build_accelerator
from lab.errors import UserError

CPU = torch.device("cpu")
SIZES = (23, 8, 0, 2, 1)  # images of each class
LABELS = torch.arange(5).repeat_interleave(torch.tensor(SIZES))[torch.arange(34) * 13 % 34]
SETTINGS = {"model": "lenet5", "dataset": "digits", "optimizer": "sgd", "momentum": 0.0}
SETTINGS |= {"weight_decay": 0.0, "lr": 1.0, "schedule": "constant"}


def make_split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (34, 1, 8, 8), generator=generator).byte()
    return Split(images, LABELS, tuple("abcde"))


def make_loader(kind="resident", world=(0, 1), num_parts=1, augment=(), **settings):
    options = LoaderOptions(*world, CPU, kind, num_workers=0, memory=math.inf)
    transform = BatchTransform((0.5,), (0.3,), augment, CPU)
    arguments = {"batch_size": 10, "seed": 3, "num_parts": num_parts}
    return build_loader(make_split(), transform, options, **arguments, **settings)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_balanced_sampling_draws_each_class_and_each_of_its_samples_equally_often(epoch):
    order = balanced_permutation(LABELS, 5, epoch)
    counts = order.bincount(minlength=34)
    per_class = [counts[k == LABELS] for k in range(5)]
    assert len(order) == 34
    assert sorted(int(c.sum()) for c in per_class) == [0, 8, 8, 9, 9]
    assert all(c.max() - c.min() <= 1 for c in per_class if len(c))


def test_balanced_sampling_draws_at_random():
    orders = [balanced_permutation(LABELS, *k) for k in itertools.product((1, 2), (1, 2, 3))]
    assert torch.equal(balanced_permutation(LABELS, 1, 1), orders[0])
    assert len({tuple(order.tolist()) for order in orders}) == 6
    # Which images of the largest class are drawn, and which classes are drawn once more, changes.
    assert len({tuple(sorted(o[LABELS[o] == 0].tolist())) for o in orders}) == 6
    assert len({tuple(LABELS[o].bincount().tolist()) for o in orders}) > 1
    assert not torch.equal(LABELS[orders[0]], LABELS[orders[0]].sort().values)


@pytest.mark.parametrize("kind", ["resident", "streaming"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_p2_balanced_batches_are_the_same_bits_on_any_world(world_size, kind):
    settings = {"augment": ("crop", "mixup"), "balanced_sampling": True}
    expected = list(make_loader(**settings).batches(2))
    worlds = [make_loader(kind, (r, world_size), **settings) for r in range(world_size)]
    assert sum(len(batch.labels) for batch in expected) == 34
    for shares, whole in zip(
        zip(*(w.batches(2) for w in worlds), strict=True), expected, strict=True
    ):
        for name in ("images", "labels", "indices", "targets"):
            joined = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(joined, getattr(whole, name))
    resumed = list(worlds[0].batches(2, first=2))
    assert torch.equal(resumed[0].indices, list(worlds[0].batches(2))[2].indices)


def test_p2_a_sample_that_is_drawn_again_is_augmented_differently():
    batches = list(make_loader(augment=("crop", "flip"), balanced_sampling=True).batches(1))
    indices, images = (torch.cat([getattr(b, n) for b in batches]) for n in ("indices", "images"))
    [only] = (LABELS == 4).nonzero().flatten().tolist()
    copies = images[indices == only]
    assert len(copies) in (8, 9)
    assert len({tuple(image.flatten().tolist()) for image in copies}) > 1


def test_class_weights_are_those_of_scikit_learn():
    """N / (K n_k), for the K = 4 classes that occur."""
    expected = [34 / (4 * n) if n else 0 for n in SIZES]
    assert balanced_class_weights(LABELS, 5).tolist() == pytest.approx(expected)


class TwoHeads(nn.Sequential):
    """Logits, and in training the same ones as those of an auxiliary classifier."""

    auxiliary_weight = 0.3

    def forward(self, images):
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


@pytest.fixture(scope="module")
def accelerator():
    return build_accelerator(mixed_precision="no", threads=1, quiet=True)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mixes", [(), ("mixup", "cutmix")])
def test_p2_the_loss_is_the_weighted_mean_over_the_global_batch(
    accelerator, mixes, world_size, num_parts
):
    """The weighted mean is torch's for the whole batch, with label smoothing, and soft targets."""
    settings = {"augment": mixes, "class_weights": "balanced"}
    weights = balanced_class_weights(LABELS, 5).float()
    whole = list(make_loader(**settings).batches(1))
    torch.manual_seed(0)
    model = TwoHeads(nn.Flatten(), nn.Linear(64, 5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients, losses = torch.zeros(len(whole), 5 * 64), torch.zeros(len(whole))
    for rank in range(world_size):
        config = TrainConfig(**SETTINGS, label_smoothing=0.1, grad_accum_steps=num_parts)
        train_step = prepare(FakeWorld(accelerator, world_size, rank), model, config)
        loader = make_loader(world=(rank, world_size), num_parts=num_parts, **settings)
        for i, batch in enumerate(loader.batches(1)):
            model.load_state_dict(state)
            losses[i] += train_step.run(batch)[0] / batch.global_batch_size
            gradients[i] += (state["1.weight"] - model[1].weight.detach()).flatten() / world_size
    model.load_state_dict(state)
    model.eval()
    for i, batch in enumerate(whole):
        targets = batch.labels if batch.targets is None else batch.targets
        logits = model(batch.images)
        total = F.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=0.1)
        loss = total / weights[batch.labels].sum()
        if not mixes:
            mean = F.cross_entropy(logits, targets, weights, label_smoothing=0.1)
            assert loss.item() == pytest.approx(mean.item())
        else:  # each label is given away as much as it is received
            assert (batch.targets @ weights).sum().item() == pytest.approx(
                weights[batch.labels].sum().item()
            )
        [gradient] = torch.autograd.grad(loss, [model[1].weight])
        assert losses[i].item() == pytest.approx(loss.item(), rel=1e-5)
        assert torch.allclose(gradients[i], 1.3 * gradient.flatten(), rtol=1e-4, atol=1e-6)
        assert gradient.norm() > 0.01


def test_p7_both_corrections_are_refused():
    with pytest.raises(UserError, match="--class-weights and --balanced-sampling both"):
        TrainConfig(**SETTINGS, class_weights="balanced", balanced_sampling=True)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((100, 10), []),
        ((101, 10), ["the classes are unbalanced: a has 101 training images, b has 10 (docs/"]),
        ((10, 9, 0), ["there are fewer than 10 training images of class b: "]),
        ((9, 9), ["there are fewer than 10 training images of classes a, b: "]),
        ((1000, 9, 50), ["the classes are unbalanced: a has 1,000 training images, b has 9 (",
                         "there are fewer than 10 training images of class b: "]),
    ],
)  # fmt: skip
def test_unbalanced_and_small_classes_cause_warnings(sizes, expected):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    split = Split(torch.empty(len(labels), 1, 1, 1), labels, tuple("abcde"[: len(sizes)]))
    warnings = Splits(split, split, split, (0.5,), (0.5,), "test", {}).balance_warnings()
    assert len(warnings) == len(expected)
    assert all(w.startswith(e) for w, e in zip(warnings, expected, strict=True))
