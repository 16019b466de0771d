"""P2 and P7: gradients averaged in shared memory are those of gloo, or gloo does it."""

import json
import sys

import pytest
from worlds import python, run, start, torchrun, world_by_hand

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux only")
TRAIN = ["--recipe", "smoke", "--dataset", "digits", "--threads", 1, "--timeout-seconds", 20]


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict]:
    """What each process of a world found."""
    folder = tmp_path_factory.mktemp(f"world-{request.param}")
    ended = run(torchrun(request.param, "tests/checks_exchange.py", folder), limit=100)
    assert ended.code == 0, ended.stderr
    return [
        json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(request.param)
    ]


@pytest.mark.parametrize("case", ["plain", "frozen", "accumulated"])
def test_p2_the_mean_is_gloos_and_the_same_on_every_process(processes, case):
    found = [process[case] for process in processes]
    assert all(process["shares"] for process in found)
    assert all(process["difference"] < 1e-5 for process in found)
    assert len({process["digest"] for process in found}) == 1


def test_p7_where_one_process_cannot_share_memory_none_does(processes):
    for process in processes:
        assert process["refused"] == {
            "no room": False,
            "one cannot map": False,
            "another's file": False,
        }


def test_the_memory_is_given_back(processes):
    for process in processes:
        assert process["mapped"] > 0
        assert process["mapped after"] == 0


@pytest.mark.slow
def test_p7_a_process_killed_in_an_exchange_is_told_of(tmp_path):
    """It is train.py's own: the fifth step's exchange, of which one process does not come back."""
    command = python("tests/dying_exchange.py", *TRAIN, "--output-dir", tmp_path)
    envs = world_by_hand(2)
    with start(command, envs[0]) as left, start(command, envs[1]):
        ended = left.wait(60)
    [error] = ended.errors
    assert error.startswith("error: process 0 lost another one")
    assert "Traceback" not in ended.stderr
    assert ended.code == 2
