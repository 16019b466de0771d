"""P3: a run that is killed with SIGKILL and resumed ends like an uninterrupted one.

Two kills at seeded moments; `make soak` does as many as wanted, also on two processes, one of which
fails in test_launch.py.
"""

from dataclasses import replace

from killing import CONFIGURATIONS, Reference, command, rows, survive

import train

LENET = CONFIGURATIONS["LeNet-5, ema 0.9"]
OPTIONS = ("--epochs", 3, "--max-train-samples", 320, "--grad-accum-steps", 2)
MOMENTS = [("save", "all"), ("evaluation", "all")]


def test_p3_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    configuration = replace(LENET, words=(*LENET.words, *OPTIONS))
    whole = tmp_path / "reference"
    train.main(command(configuration, whole)[2:])
    last = {row["epoch"]: row["step"] for row in rows(whole / "steps.jsonl")}
    reference = Reference(whole, list(last.values()))
    kills = survive(configuration, reference, tmp_path / "killed", MOMENTS, seed=0)
    # No run finished before its moment.
    assert [(kill.moment, kill.victim) for kill in kills] == MOMENTS
