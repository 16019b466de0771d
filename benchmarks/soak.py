"""Kill runs at random moments, resume them, and compare the results with uninterrupted runs.

  python benchmarks/soak.py                          36 kills: about ten minutes on one core
  python benchmarks/soak.py --kills 200 --seed 1
  python benchmarks/soak.py --minutes 60 --log soak.txt

Each kill is a SIGKILL of train.py --resume auto, or of one of its two processes; the run is then
resumed. The exit code is 1 if any file differs.
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

sys.path.insert(0, str(ROOT / "tests/helpers"))  # first: this directory has a worlds.py, too

from killing import CONFIGURATIONS, MOMENTS, Kill, run_uninterrupted, survive

KILLS_PER_RUN = 3
WIDTHS = "{:30} {:11} {:11} {:22} {:>5} {:10} {:>7} {:>5} {}"


def main() -> int:
    """Kill and resume runs; return 1 if a result differs, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=36, help="number of kills in total")
    parser.add_argument("--minutes", type=float, default=0, help="time limit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--log", help="also write the output to this file")
    args = parser.parse_args()
    log = open(args.log, "w") if args.log else None  # noqa: SIM115
    start_time = time.monotonic()

    def info(line: str) -> None:
        for file in filter(None, (sys.stdout, log)):
            print(line, file=file, flush=True)

    machine = environment()
    info(f"command   python benchmarks/soak.py {' '.join(sys.argv[1:])}".rstrip())
    info(f"machine   {platform.platform()}, {machine['cores']} core(s) used of {os.cpu_count()}")
    info(f"versions  {' '.join(f'{k} {v}' for k, v in machine['versions'].items())}")
    info(f"commit    {machine['commit']}\n")
    info(WIDTHS.format("configuration", "moment", "killed", "during", "step", "temporary",
                      "resumed", "lost", "end"))  # fmt: skip
    kills: list[tuple[str, Kill, str]] = []
    references, moments = {}, random.Random(args.seed)
    kinds = itertools.cycle(moments.sample(MOMENTS, len(MOMENTS)))
    victims = itertools.cycle(("all", "one worker"))
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(itertools.cycle(CONFIGURATIONS)):
            over = args.minutes and time.monotonic() - start_time > args.minutes * 60
            if len(kills) >= args.kills or over:
                break
            configuration, folder = CONFIGURATIONS[name], Path(temporary) / str(number)
            if name not in references:
                references[name] = run_uninterrupted(configuration, folder / "reference")
            chosen = [next(kinds) for _ in range(KILLS_PER_RUN)]
            chosen.sort(key="end".__eq__)  # the last moment of a run
            if number // len(CONFIGURATIONS) % 2 == 0:
                next(kinds)  # so that the moments of a configuration vary
            many = configuration.num_processes > 1
            plan = [(kind, next(victims) if many else "all") for kind in chosen]
            seed = moments.randrange(2**31)
            verdict, suffered = "identical", []
            try:
                suffered = survive(configuration, references[name], folder / "killed", plan, seed)
            except AssertionError as error:
                verdict = "DIFFERS"
                info(f"{name}, {plan}, seed {seed}: {error}")
                kills.append((name, Kill("", ""), verdict))
            for kill in suffered:
                kills.append((name, kill, verdict))
                lost = kill.step - kill.resumed_from
                info(WIDTHS.format(name, kill.moment, kill.victim, kill.during, kill.step,
                                  "yes" if kill.has_temporary else "no", kill.resumed_from, lost,
                                  verdict))  # fmt: skip
    info("\nconfiguration                  kills  identical at the end")
    for name in references:
        verdicts = [v for n, _, v in kills if n == name]
        info(f"{name:30} {len(verdicts):5}  {verdicts.count('identical')}")
    info("\nduring                         kills")
    for what, count in Counter(kill.during for _, kill, _ in kills).most_common():
        info(f"{what:30} {count:5}")
    num_temporary = sum(kill.has_temporary for _, kill, _ in kills)
    same = sum(v == "identical" for *_, v in kills)
    minutes = (time.monotonic() - start_time) / 60
    info(
        f"\n{len(kills)} kills, {minutes:.1f} minutes; "
        f"{num_temporary} while a checkpoint was written or removed"
    )
    info(f"{same} of them in runs with identical results")
    return int(same < len(kills))


if __name__ == "__main__":
    sys.exit(main())
