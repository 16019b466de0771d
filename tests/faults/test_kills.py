"""P3: runs that are killed with SIGKILL and resumed end like uninterrupted ones.

A few kills at seeded moments; `make soak` does as many as wanted.
"""

from dataclasses import replace

import pytest
from killing import CONFIGURATIONS, run_uninterrupted, survive

LENET5 = CONFIGURATIONS["LeNet-5"]
TWO = CONFIGURATIONS["LeNet-5, 2 processes"]
ALEXNET = CONFIGURATIONS["AlexNet, dropout"]
CASES = {
    "accumulation-and-ema": (
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
def test_p3_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, case):
    configuration, moments = CASES[case]
    reference = run_uninterrupted(configuration, tmp_path / "reference")
    kills = survive(configuration, reference, tmp_path / "killed", moments, seed=0)
    assert [
        (kill.moment, kill.victim) for kill in kills
    ] == moments  # no run finished before its moment
