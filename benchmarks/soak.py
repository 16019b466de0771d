"""Trainings killed at random moments, whose ends must equal undisturbed trainings' bit for bit.

  python benchmarks/soak.py                          36 kills: about ten minutes on one core
  python benchmarks/soak.py --kills 200 --seed 1
  python benchmarks/soak.py --minutes 60 --log soak.txt

Each is a real SIGKILL of a real train.py, --resume auto, which is then started again; of a world of
two processes sometimes the whole, sometimes one worker. Ends in 1 where anything differs.
"""

import argparse
import itertools
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import ROOT, environment

sys.path.insert(0, str(ROOT / "tests"))  # before this folder, which has a worlds.py, too

from killing import CONFIGURATIONS, MOMENTS, Kill, survive, undisturbed

KILLS_A_TRAINING = 3
WIDTHS = "{:30} {:11} {:11} {:22} {:>5} {:10} {:>7} {:>5} {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=36, help="how many, over all configurations")
    parser.add_argument("--minutes", type=float, default=0, help="end after so many, at the latest")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--log", help="file that gets what is printed")
    given = parser.parse_args()
    log = open(given.log, "w") if given.log else None  # noqa: SIM115
    begun = time.monotonic()

    def say(line: str) -> None:
        for file in filter(None, (sys.stdout, log)):
            print(line, file=file, flush=True)

    found = environment()
    say(f"command   python benchmarks/soak.py {' '.join(sys.argv[1:])}".rstrip())
    say(f"machine   {platform.platform()}, {found['cores']} core(s) used of {os.cpu_count()}")
    say(f"versions  {' '.join(f'{k} {v}' for k, v in found['versions'].items())}")
    say(f"commit    {found['commit']}\n")
    say(WIDTHS.format("configuration", "moment", "killed", "during", "step", "temporary",
                      "resumed", "lost", "end"))  # fmt: skip
    kills: list[tuple[str, Kill, str]] = []
    references, moments = {}, random.Random(given.seed)
    kinds = itertools.cycle(moments.sample(MOMENTS, len(MOMENTS)))
    victims = itertools.cycle(("all", "one worker"))
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(itertools.cycle(CONFIGURATIONS)):
            over = given.minutes and time.monotonic() - begun > given.minutes * 60
            if len(kills) >= given.kills or over:
                break
            configuration, folder = CONFIGURATIONS[name], Path(temporary) / str(number)
            if name not in references:
                references[name] = undisturbed(configuration, folder / "reference")
            chosen = [next(kinds) for _ in range(KILLS_A_TRAINING)]
            chosen.sort(key="end".__eq__)  # after it nothing is left to be killed
            if number // len(CONFIGURATIONS) % 2 == 0:
                next(kinds)  # so that a configuration does not meet the same moments each time
            many = configuration.num_processes > 1
            plan = [(kind, next(victims) if many else "all") for kind in chosen]
            seed = moments.randrange(2**31)
            verdict, suffered = "identical", []
            try:
                suffered = survive(configuration, references[name], folder / "killed", plan, seed)
            except AssertionError as error:
                verdict = "DIFFERS"
                say(f"{name}, {plan}, seed {seed}: {error}")
                kills.append((name, Kill("", ""), verdict))
            for kill in suffered:
                kills.append((name, kill, verdict))
                lost = kill.step - kill.resumed_from
                say(WIDTHS.format(name, kill.moment, kill.victim, kill.during, kill.step,
                                  "yes" if kill.half_state else "no", kill.resumed_from, lost,
                                  verdict))  # fmt: skip
    say("\nconfiguration                  kills  identical at the end")
    for name in references:
        verdicts = [v for n, _, v in kills if n == name]
        say(f"{name:30} {len(verdicts):5}  {verdicts.count('identical')}")
    say("\nduring                         kills")
    for what, count in Counter(kill.during for _, kill, _ in kills).most_common():
        say(f"{what:30} {count:5}")
    half = sum(kill.half_state for _, kill, _ in kills)
    same = sum(v == "identical" for *_, v in kills)
    minutes = (time.monotonic() - begun) / 60
    say(
        f"\n{len(kills)} kills, {minutes:.1f} minutes; {half} found a state half written or removed"
    )
    say(f"{same} of them in trainings that ended as if nothing had happened")
    return int(same < len(kills))


if __name__ == "__main__":
    sys.exit(main())
