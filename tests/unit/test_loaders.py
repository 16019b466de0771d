"""P1 and P2: which samples are in which batch, on any number of processes, from either loader."""

import gc
import math
import weakref
from contextlib import closing
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import write_png
from torchvision.transforms import v2

from lab.config.schema import EVAL_BATCH_SIZE, TrainConfig
from lab.data.decode import FileImages
from lab.data.images import AugmentedImages
from lab.data.loaders import (
    LoaderOptions,
    ResidentLoader,
    StreamingLoader,
    build_loader,
    build_loaders,
    choose_kind,
)
from lab.data.sampler import (
    ShardedBatchSampler,
    balanced_permutation,
    derive_seed,
    permutation,
    random_bits,
    shard,
)
from lab.data.splits import Splits
from lab.data.transforms import BatchTransform, EvalTransform, Mixup, SampleTransform
from lab.data.types import Split
from lab.errors import UserError

WORLDS = [1, 2, 3, 64]
CPU = torch.device("cpu")
NAMES = ("a", "b")
STEPS = ("crop", "flip", "cutout")
SIZE, NUM_FILES = 12, 23
# Of seed 42 and epoch 3.
GOLDEN_BITS = [2051983457722697131, -3516247355992700007]
GOLDEN_ORDER = [5, 3, 4, 2, 7, 1, 6, 9, 11, 0, 8, 10]
GOLDEN_BALANCED = [8, 5, 7, 10, 2, 6, 3, 9, 9, 1, 4, 4]


def make_split(num_samples, images=None):
    if images is None:
        shape = (num_samples, 3, SIZE, SIZE)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(num_samples) % 2, NAMES)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Return (a split in memory, the same split in PNG files)."""
    split, folder = make_split(NUM_FILES), tmp_path_factory.mktemp("images")
    paths = tuple(str(folder / f"{i:03}.png") for i in range(NUM_FILES))
    for path, image in zip(paths, split.images, strict=True):
        write_png(image, path)
    return split, make_split(NUM_FILES, FileImages(paths, EvalTransform(SIZE)))


def make_loader(
    split, kind="resident", workers=0, batch_size=5, seed=3, world=(0, 1), steps=STEPS, num_parts=1
):
    plan = ShardedBatchSampler(len(split.labels), batch_size, seed, *world, num_parts)
    transform = BatchTransform((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), steps, CPU)
    if kind == "resident":
        return ResidentLoader(split, plan, transform, CPU)
    return StreamingLoader(split, plan, transform, CPU, workers)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.global_batch_size == b.global_batch_size
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        assert a.images.dtype == b.images.dtype == torch.float32
        assert torch.equal(a.images, b.images)


def global_batches(num_samples, batch_size, seed, world_size, num_parts=1):
    """(each global batch as a list of parts, each a list of ranges by process; all cuts)."""
    plans = [
        ShardedBatchSampler(num_samples, batch_size, seed, r, world_size, num_parts)
        for r in range(world_size)
    ]
    assert all(torch.equal(p.order(1), plans[0].order(1)) for p in plans[1:3])
    cuts = [list(p.slices()) for p in plans]
    batches = [
        list(zip(*(cut.parts for cut in batch), strict=True)) for batch in zip(*cuts, strict=True)
    ]
    return batches, cuts


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("num_items", [0, 1, 63, 64, 65, 1_281_167])
def test_p1_shards_cover_all_once_and_differ_by_at_most_one(num_items, world_size):
    shards = [shard(num_items, rank, world_size) for rank in range(world_size)]
    assert (shards[0].start, shards[-1].stop) == (0, num_items)
    assert all(a.stop == b.start for a, b in pairwise(shards))
    sizes = [s.stop - s.start for s in shards]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_samples", [0, 1, 100, 1_281_167])
def test_p1_an_epoch_holds_each_sample_once(num_samples):
    order = permutation(num_samples, seed=1, epoch=2)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(num_samples))


def test_p2_order_differs_by_epoch_and_by_seed_and_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    seeds = (0, 1, 2, 3, 4095, 4096, 2**20, 2**30, 2**31 - 4096, 2**31 - 1)
    orders = {tuple(permutation(50, s, e).tolist()) for s in seeds for e in range(4)}
    assert len(orders) == 4 * len(seeds)
    assert torch.equal(permutation(50, 2, 3), permutation(50, 2, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_p2_p3_no_release_changes_the_order_or_the_random_bits():
    """Otherwise a run that is resumed after an upgrade would see other samples."""
    assert permutation(12, seed=42, epoch=3).tolist() == GOLDEN_ORDER
    assert random_bits(42, 3, 2, "cpu").tolist() == GOLDEN_BITS
    assert derive_seed(42, 7, 0) == 4241644000
    labels = torch.arange(12) % 5 // 2  # 6 of class 0, 4 of class 1, 2 of class 2
    assert balanced_permutation(labels, seed=42, epoch=3).tolist() == GOLDEN_BALANCED


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 4), (99, 10), (100, 10), (101, 10)])
def test_p2_batches_are_the_same_for_any_world(num_samples, batch_size, world_size):
    batches, cuts = global_batches(num_samples, batch_size, 5, world_size)
    expected = torch.arange(num_samples).split(batch_size)
    assert (
        len(batches)
        == len(expected)
        == ShardedBatchSampler(num_samples, batch_size, 5, 0, 1).num_batches
    )
    for [shares], whole in zip(batches, expected, strict=True):
        assert [i for share in shares for i in share] == whole.tolist()
        sizes = [len(s) for s in shares]
        assert max(sizes) - min(sizes) <= 1
    for of_a_process in cuts:
        assert [cut.global_batch_size for cut in of_a_process] == [len(whole) for whole in expected]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 4), (99, 10), (100, 10), (101, 10)])
def test_p1_evaluation_deals_out_whole_batches_and_counts_each_sample_once(
    num_samples, batch_size, world_size
):
    plans = [
        ShardedBatchSampler(num_samples, batch_size, None, r, world_size) for r in range(world_size)
    ]
    cuts = [cut for plan in plans for cut in plan.slices()]
    whole = torch.arange(num_samples).split(batch_size)
    assert torch.equal(plans[0].order(7), torch.arange(num_samples))
    assert [list(part) for cut in cuts for part in cut.parts] == [w.tolist() for w in whole]
    assert [cut.global_batch_size for cut in cuts] == [len(w) for w in whole]
    counts = [sum(1 for _ in plan.slices()) for plan in plans]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("seed", "epoch"), [(3, 1), (3, 2), (None, 1)])
@pytest.mark.parametrize("world", [(0, 1), (2, 3)])
@pytest.mark.parametrize("batch_size", [1, 11, NUM_FILES + 1])
def test_p2_both_loaders_give_the_same_bits(splits, batch_size, world, seed, epoch):
    expected = list(
        make_loader(splits[0], batch_size=batch_size, seed=seed, world=world).batches(epoch)
    )
    for split in splits:
        loader = make_loader(split, "streaming", 0, batch_size, seed, world)
        assert_same(loader.batches(epoch), expected)


@pytest.mark.parametrize("seed", [3, None])
def test_p2_workers_change_nothing(splits, seed):
    expected = make_loader(splits[0], seed=seed)
    loader = make_loader(splits[1], "streaming", workers=2, seed=seed)
    before = torch.initial_seed()
    for epoch in (1, 2, 1):  # the workers live on from epoch to epoch
        assert_same(loader.batches(epoch), expected.batches(epoch))
    assert torch.initial_seed() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_p2_an_epoch_left_midway_does_not_leak_into_the_next(splits, workers):
    loader = make_loader(splits[1], "streaming", workers)
    for _ in zip(range(2), loader.batches(1), strict=False):
        pass
    assert_same(loader.batches(2), make_loader(splits[0]).batches(2))


@pytest.mark.parametrize(("kind", "workers"), [("resident", 0), ("streaming", 0), ("streaming", 2)])
def test_p3_an_epoch_resumes_at_any_batch(splits, kind, workers):
    split = splits[kind == "streaming"]
    loader = make_loader(split, kind, workers)
    whole = list(loader.batches(4))
    assert len(whole) == 5
    for first in (0, 1, 4, 5):
        assert_same(loader.batches(4, first=first), whole[first:])
    later = make_loader(split, kind, workers)  # another process, after the first was killed
    assert_same(later.batches(4, first=2), whole[2:])


@pytest.mark.parametrize("kind", ["resident", "streaming"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_p2_uneven_and_empty_shards_join_to_the_same_batch(splits, world_size, kind):
    num_samples = 13  # batches of 4, 4, 4 and 1: the last leaves most processes none
    split = splits[kind == "streaming"].select(torch.arange(num_samples))
    expected = list(make_loader(split, kind, batch_size=4).batches(1))
    parts = [
        list(make_loader(split, kind, 0, 4, world=(r, world_size)).batches(1))
        for r in range(world_size)
    ]
    sizes = [len(part[-1].labels) for part in parts]
    assert sorted(sizes) == [0] * (world_size - 1) + [1]
    for shares, whole in zip(zip(*parts, strict=True), expected, strict=True):
        for name in ("images", "labels", "indices"):
            joined = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(joined, getattr(whole, name))
        assert {share.global_batch_size for share in shares} == {whole.global_batch_size}


@pytest.mark.parametrize("kind", ["resident", "streaming"])
def test_p1_a_process_may_have_nothing_to_evaluate(splits, kind):
    split = splits[kind == "streaming"]
    parts = [list(make_loader(split, kind, 0, 10, None, (rank, 5)).batches()) for rank in range(5)]
    assert sorted(len(part) for part in parts) == [0, 0, 1, 1, 1]
    index = torch.cat([batch.indices for part in parts for batch in part])
    assert torch.equal(index, torch.arange(NUM_FILES))


def test_a_loader_is_freed_with_its_last_reference():
    """Its images would leave too little memory for the next run in the same process."""
    loader = make_loader(make_split(7))
    reference = weakref.ref(loader)
    gc.disable()
    try:
        assert len(list(loader.batches())) == 2
        del loader
        assert reference() is None
    finally:
        gc.enable()


def test_evaluation_is_in_order_and_never_augmented(splits):
    split = splits[0]
    plain = BatchTransform((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (), CPU)
    batches = list(make_loader(split, seed=None).batches())
    assert torch.equal(torch.cat([b.images for b in batches]), plain(split.images))
    assert torch.equal(torch.cat([b.labels for b in batches]), split.labels)


def built(split, kind, memory=math.inf, world_size=1, seed=0):
    options = LoaderOptions(0, world_size, CPU, kind, num_workers=2, memory=memory)
    transform = BatchTransform((0.5,), (0.5,), (), CPU)
    return build_loader(split, transform, options, batch_size=4, seed=seed)


@pytest.mark.parametrize("balance", [{"class_weights": "balanced"}, {"balanced_sampling": True}])
def test_the_training_loader_has_the_settings_of_the_run(splits, balance):
    split, names = splits[0], ("flip", "mixup")
    settings = {"batch_size": 6, "seed": 7, "grad_accum_steps": 2, "mixup_alpha": 0.3, **balance}
    config = TrainConfig(model="lenet5", dataset="digits", augment=",".join(names), **settings)
    parts = Splits(split, split, split, (0.5,) * 3, (0.25,) * 3, "test", {})
    options = LoaderOptions(0, 1, CPU, "resident", num_workers=0, memory=math.inf)
    transform = BatchTransform(parts.mean, parts.std, names, CPU, mixup_alpha=0.3)
    expected = build_loader(split, transform, options, batch_size=6, seed=7, num_parts=2, **balance)
    found, val, test = build_loaders(parts, config, options)
    assert val is test
    assert val.sampler.batch_size == EVAL_BATCH_SIZE  # as in evaluate.py
    assert found.mixup == Mixup(("mixup",), 0.3)
    for a, b in zip(found.batches(1), expected.batches(1), strict=True):
        assert a.part_sizes == b.part_sizes
        assert len(a.part_sizes) == min(2, a.global_batch_size)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)
        assert (a.class_weights is None) == ("class_weights" not in balance)
        assert a.class_weights is None or torch.equal(a.class_weights, b.class_weights)


@pytest.mark.parametrize(("given", "threads", "expected"), [(-1, 3, 3), (-1, 32, 8), (9, 3, 9)])
def test_there_is_one_worker_per_thread_but_at_most_eight(monkeypatch, given, threads, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    accelerator = SimpleNamespace(device=CPU, process_index=0, num_processes=1)
    assert LoaderOptions.create(accelerator, "streaming", given).num_workers == expected


def test_auto_is_resident_if_decoded_images_fit(splits):
    decoded, files = splits
    num_bytes = NUM_FILES * 3 * SIZE * SIZE
    assert isinstance(built(decoded, "auto", num_bytes), ResidentLoader)
    assert isinstance(built(decoded, "auto", num_bytes - 1), StreamingLoader)
    assert isinstance(built(files, "auto"), StreamingLoader)
    assert isinstance(built(decoded, "streaming"), StreamingLoader)
    assert isinstance(built(decoded, "resident", 0), ResidentLoader)
    # Without a validation split, the images of the test split are in memory once.
    all_images = [decoded.images.clone(), decoded.images, decoded.images]
    assert choose_kind("auto", all_images, 2 * num_bytes) == "resident"
    assert choose_kind("auto", all_images, 2 * num_bytes - 1) == "streaming"


def test_p7_a_batch_smaller_than_the_world_is_refused_in_training_only(splits):
    with pytest.raises(
        ValueError, match="--batch-size 4 is smaller than the number of processes, 5"
    ):
        built(splits[0], "auto", world_size=5)
    assert built(splits[0], "auto", world_size=4).sampler.world_size == 4
    assert built(splits[0], "auto", world_size=5, seed=None).sampler.world_size == 5


def test_p2_the_random_bits_of_a_sample_are_its_own():
    sampler = ShardedBatchSampler(NUM_FILES, 5, 3, 0, 1)
    order = sampler.order(2)
    assert torch.equal(sampler.bits(2, order), random_bits(3, 2, NUM_FILES, "cpu")[order])


# Augmentation of single samples

SAMPLE_STEPS = ("resized-crop", "trivialaugment", "erasing")


@pytest.mark.parametrize("names", [("resized-crop",), ("trivialaugment",), ("randaugment",),
                                   ("erasing",), SAMPLE_STEPS])  # fmt: skip
@pytest.mark.parametrize("in_chans", [1, 3])
def test_p2_the_augmentation_of_a_sample_is_a_function_of_its_seed(names, in_chans):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (in_chans, 30, 50), dtype=torch.uint8, generator=generator)
    transform = SampleTransform(names, EvalTransform(16), (0.5,) * in_chans)
    state = torch.get_rng_state()
    seeds = range(-10 * 2**24, 10 * 2**24, 2**24)  # which differ in their upper bits only
    results = [transform(image, seed) for seed in seeds]
    assert all(r.shape == (in_chans, 16, 16) and r.dtype == torch.uint8 for r in results)
    again = [transform(image, seed) for seed in reversed(seeds)][::-1]
    assert all(map(torch.equal, results, again))
    assert len({r.numpy().tobytes() for r in results}) > 2
    assert torch.equal(torch.get_rng_state(), state)


def test_resized_crop_has_the_interpolation_of_the_run():
    image = torch.randint(256, (3, 30, 50), dtype=torch.uint8)
    bilinear, bicubic = (
        SampleTransform(("resized-crop",), transform, (0.5,) * 3)(image, seed=1)
        for transform in (EvalTransform(16), EvalTransform(16, interpolation="bicubic"))
    )
    assert not torch.equal(bilinear, bicubic)


def augmented(split, images):
    transform = SampleTransform(SAMPLE_STEPS, EvalTransform(SIZE), (0.4, 0.5, 0.6))
    return make_split(NUM_FILES, AugmentedImages(images, split.images, transform))


@pytest.mark.parametrize("steps", [("flip",), ("flip", "cutmix")])
def test_p2_augmented_samples_do_not_depend_on_workers_or_processes(splits, steps):
    split, files = splits
    make = partial(make_loader, kind="streaming", steps=steps)
    whole = make(augmented(split, split.images))
    expected = list(whole.batches(2))
    with closing(make(augmented(split, files.images), workers=2)) as loader:
        assert_same(loader.batches(2), expected)
        assert_same(loader.batches(2, first=3), expected[3:])
    assert not torch.equal(expected[0].images, next(whole.batches(1)).images)
    shards = [list(make(augmented(split, files.images), world=(rank, 3)).batches(2))
              for rank in range(3)]  # fmt: skip
    for batch, *parts in zip(expected, *shards, strict=True):
        assert torch.equal(batch.indices, torch.cat([part.indices for part in parts]))
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))


def test_p7_unreadable_images_of_a_batch_are_named_together(splits, tmp_path):
    split, _ = splits
    missing = FileImages(tuple(f"{tmp_path}/{i}.png" for i in range(NUM_FILES)), SIZE)
    loader = make_loader(augmented(split, missing), "streaming", steps=())
    with pytest.raises(UserError, match="cannot read 5 images"):
        next(loader.batches(1))


# Images as they are evaluated


def test_evaluated_images_are_cropped_as_after_resizing():
    image = torch.arange(0, 200, dtype=torch.float).expand(3, 100, 200).byte()  # a ramp
    resized = v2.functional.resize(image, [64, 128], antialias=True)
    expected = v2.functional.center_crop(resized, [56, 56])
    found = EvalTransform(56, crop_pct=0.875)(image)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert torch.equal(EvalTransform(56)(image[:, :, 50:150]), EvalTransform(56)(image))


def test_images_are_padded_or_squashed():
    image = torch.full((3, 20, 40), 200, dtype=torch.uint8)
    padded = EvalTransform(10, fit="pad")(image)
    assert padded.shape == (3, 10, 10)
    assert padded[0, :, 0].tolist() == [0] * 2 + [200] * 5 + [0] * 3
    assert torch.equal(EvalTransform(10, fit="pad")(image.transpose(1, 2)), padded.transpose(1, 2))
    assert EvalTransform(8, fit="pad")(torch.zeros(3, 1, 5000, dtype=torch.uint8)).shape == (
        3,
        8,
        8,
    )
    ramp = torch.arange(40, dtype=torch.uint8).expand(3, 20, 40)
    squashed = EvalTransform(20, fit="squash")(ramp)
    assert squashed.shape == (3, 20, 20)
    assert squashed[0, 0, 0] <= 1
    assert squashed[0, 0, -1] >= 38
