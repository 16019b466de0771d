"""P3: real trainings, killed with SIGKILL and started again, end as if nothing had happened.

A handful, at moments that a seed chooses; `make soak` has as many as one likes.
"""

from dataclasses import replace

import pytest
from killing import CONFIGURATIONS, survive, undisturbed

LENET5 = CONFIGURATIONS["LeNet-5"]
TWO = CONFIGURATIONS["LeNet-5, 2 processes"]
ALEXNET = CONFIGURATIONS["AlexNet, dropout"]
CASES = {
    "accumulation-and-average": (
        replace(
            LENET5,
            words=(*LENET5.words, "--grad-accum-steps", 2, "--ema-decay", 0.9, "--epochs", 3),
        ),
        [("save", "all"), ("evaluation", "all")],
    ),
    "dropout": (
        replace(ALEXNET, words=(*ALEXNET.words, "--max-train-samples", 36, "--epochs", 2)),
        [("save", "all")],
    ),
    "two-processes": (
        replace(TWO, words=(*TWO.words, "--epochs", 2)),
        [("step", "one worker")],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_p3_a_killed_training_ends_like_an_undisturbed_one(tmp_path, case):
    configuration, moments = CASES[case]
    reference = undisturbed(configuration, tmp_path / "reference")
    kills = survive(configuration, reference, tmp_path / "killed", moments, seed=0)
    assert [(kill.moment, kill.victim) for kill in kills] == moments  # none came too late
