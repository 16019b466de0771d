"""P2 and the loss of mixed batches: how they are mixed depends on (seed, epoch, batch) alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.io import write_png
from trainers import prepare

from lab.config.schema import TrainConfig
from lab.data.decode import FileImages
from lab.data.loaders import ResidentLoader, StreamingLoader
from lab.data.sampler import ShardedBatchSampler
from lab.data.transforms import BatchMix, BatchTransform, EvalTransform, Mixup
from lab.data.types import Batch, Split
from lab.distributed import build_accelerator

CPU = torch.device("cpu")
SIZE, NUM_SAMPLES = 12, 13
BOTH = ("mixup", "cutmix")
GOLDEN = [
    BatchMix(0.6875, (4, 24, 14, 28)),
    BatchMix(0.6644659048545797),
    BatchMix(0.5741001840101685),
    BatchMix(0.8035714285714286, (5, 21, 0, 11)),
]  # seed 42, epoch 3, 32 by 28 pixels


def test_p2_what_is_drawn_for_a_batch_never_changes():
    mixer = Mixup(BOTH, 1.0)
    for batch, expected in enumerate(GOLDEN):
        found = mixer.draw(42, 3, batch, 32, 28)
        assert (found.ratio, found.box) == (pytest.approx(expected.ratio), expected.box)


def test_the_share_of_cutmix_is_the_area_that_is_left():
    images = torch.cat((torch.zeros(1, 1, 9, 14), torch.ones(1, 1, 9, 14)))
    shares = []
    for batch in range(500):
        mix = Mixup(("cutmix",), 1.0).draw(0, 1, batch, 9, 14)
        assert mix(images).mean().item() == pytest.approx(mix.ratio)
        shares.append(mix.ratio)
    assert 0 <= min(shares) < 0.4
    assert max(shares) == 1  # a box of no pixels


def test_an_image_is_mixed_with_the_one_before_it():
    images = torch.randn(4, 3, 6, 5)
    before = images.clone()
    laid_over, cut = BatchMix(0.25)(images), BatchMix(0.8, (1, 4, 2, 5))(images)
    assert torch.equal(images, before)
    for i in range(3):
        torch.testing.assert_close(laid_over[i], 0.25 * images[i + 1] + 0.75 * images[i])
        expected = images[i + 1].clone()
        expected[:, 1:4, 2:5] = images[i][:, 1:4, 2:5]
        assert torch.equal(cut[i], expected)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Return (a split in memory, the same split in PNG files)."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_SAMPLES, 3, SIZE, SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels, folder = torch.arange(NUM_SAMPLES), tmp_path_factory.mktemp("images")
    paths = tuple(str(folder / f"{i:03}.png") for i in range(NUM_SAMPLES))
    for path, image in zip(paths, images, strict=True):
        write_png(image, path)
    names = tuple(map(str, range(NUM_SAMPLES)))
    return Split(images, labels, names), Split(
        FileImages(paths, EvalTransform(SIZE)), labels, names
    )


def make_loader(split, kind="resident", world=(0, 1), seed=3, mixes=BOTH, workers=0, num_parts=1):
    plan = ShardedBatchSampler(NUM_SAMPLES, 4, seed, *world, num_parts)  # batches of 4, 4, 4 and 1
    augment = ("flip", "crop", *mixes)
    transform = BatchTransform((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), augment, CPU)
    if kind == "resident":
        return ResidentLoader(split, plan, transform, CPU)
    return StreamingLoader(split, plan, transform, CPU, workers)


@pytest.mark.parametrize("kind", ["resident", "streaming"])
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_p2_mixed_batches_are_the_same_bits_on_any_world(splits, world_size, num_parts, kind):
    expected = list(make_loader(splits[0]).batches(2))
    split, workers = splits[kind == "streaming"], int(world_size == 2)
    worlds = [
        make_loader(split, kind, (r, world_size), workers=workers, num_parts=num_parts)
        for r in range(world_size)
    ]
    batches = [list(loader.batches(2)) for loader in worlds]
    for loader in worlds:
        loader.close()
    assert len(expected) == 4
    for shares, whole in zip(zip(*batches, strict=True), expected, strict=True):
        assert {len(s.part_sizes) for s in shares} == {min(num_parts, len(whole.labels))}
        for name in ("images", "labels", "indices", "targets"):
            parts = zip(*(getattr(s, name).split(s.part_sizes) for s in shares), strict=True)
            joined = torch.cat([share for part in parts for share in part])
            assert torch.equal(joined, getattr(whole, name))
        assert {share.global_batch_size for share in shares} == {len(whole.labels)}


def test_p2_a_batch_is_its_images_each_augmented_alone_then_mixed(splits):
    plain = make_loader(splits[0], mixes=())
    for number, (mixed, batch) in enumerate(
        zip(make_loader(splits[0]).batches(1), plain.batches(1), strict=True)
    ):
        mix = Mixup(BOTH, 1.0).draw(3, 1, number, SIZE, SIZE)
        assert torch.equal(mixed.images, mix(torch.cat((batch.images[-1:], batch.images))))
        assert torch.equal(mixed.indices, batch.indices)
        assert torch.equal(mixed.labels, batch.labels)
        own, partners = (
            F.one_hot(labels, NUM_SAMPLES) for labels in (batch.labels, batch.labels.roll(1))
        )
        torch.testing.assert_close(mixed.targets, mix.ratio * own + (1 - mix.ratio) * partners)
        assert batch.targets is None


@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_p3_a_mixed_epoch_resumes_at_any_batch(splits, kind):
    loader = make_loader(splits[0], kind)
    for first in range(1, 4):
        later = list(loader.batches(4, first))
        for found, batch in zip(later, list(loader.batches(4))[first:], strict=True):
            assert torch.equal(found.images, batch.images)


def test_evaluation_is_never_mixed(splits):
    batches = list(make_loader(splits[0], seed=None).batches())
    assert torch.equal(torch.cat([b.indices for b in batches]), torch.arange(NUM_SAMPLES))
    assert all(batch.targets is None for batch in batches)


class TwoHeads(nn.Module):
    """Logits, and in training those of an auxiliary classifier."""

    auxiliary_weight = 0.3

    def __init__(self):
        super().__init__()
        self.main, self.other = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, images):
        x = images.flatten(1)
        return (self.main(x), self.other(x)) if self.training else self.main(x)


@pytest.fixture(scope="module")
def accelerator():
    return build_accelerator(mixed_precision="no", threads=1, quiet=True)


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_p2_the_loss_is_that_of_both_labels_by_their_share(
    accelerator, share, smoothing, grad_accum_steps
):
    """Cross-entropy with the mixed labels as probabilities; of a part of a batch, too."""
    torch.manual_seed(0)
    model = TwoHeads()
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    settings |= {"lr": 1.0, "label_smoothing": smoothing, "grad_accum_steps": grad_accum_steps}
    train_step = prepare(accelerator, model, TrainConfig(dataset="digits", **settings))
    images, labels, partners = torch.randn(7, 1, 2, 3), torch.arange(7) % 5, torch.arange(7) % 3
    targets = share * F.one_hot(labels, 5) + (1 - share) * F.one_hot(partners, 5)
    twin = copy.deepcopy(model).train()
    losses = [
        F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        for logits in twin(images)
    ]
    ((losses[0] + 0.3 * losses[1]) / 20).backward()
    main_labels = labels if share > 0.5 else partners
    num_correct = (twin(images)[0].argmax(1) == main_labels).sum().item()
    train_step.set_training_mode()
    totals = train_step.run(Batch(images, labels, torch.arange(7), 20, targets))
    assert totals.tolist() == pytest.approx([losses[0].item(), num_correct], rel=1e-5)
    for after, before in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(before.detach() - after.detach(), before.grad)


def test_a_process_without_samples_takes_a_mixed_step_too(accelerator):
    train_step = prepare(accelerator, TwoHeads(), TrainConfig(dataset="digits", lr=1.0))
    train_step.set_training_mode()
    none = torch.empty(0, dtype=torch.long)
    batch = Batch(torch.empty(0, 1, 2, 3), none, none, 1, torch.empty(0, 5))
    assert train_step.run(batch).tolist() == [0, 0]


def test_a_large_alpha_mixes_halves_and_a_small_one_almost_nothing():
    def ratios(alpha):
        return [Mixup(("mixup",), alpha).draw(0, 1, batch, 8, 8).ratio for batch in range(50)]

    assert all(abs(ratio - 0.5) < 0.2 for ratio in ratios(100.0))
    assert sum(min(ratio, 1 - ratio) < 0.01 for ratio in ratios(0.01)) > 40
