"""`python -m tests.faults`: faults at seeded points, and a table of the harm that they did."""

import argparse
import json
import os
import random
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.kills import Outcome, Trials
from tests.faults.processes import Processes
from tests.faults.report import table
from tests.faults.world import SCENARIOS, Scenario, warm_up


def outcomes_of(scenario: Scenario, folder: Path, kills: int, draw: random.Random) -> Iterator[Outcome]:
    """Disturb a command at some points, in a folder of its own."""
    trials = Trials.prepared(scenario, folder)
    for point in trials.points(kills, draw):
        yield trials.outcome(point)


def on_ray(folder: Path, draw: random.Random, share: int, shares: int) -> Iterator[Outcome]:
    """Disturb real runs, in a folder of its own."""
    yield from Processes(Trials.prepared(SCENARIOS[0], folder), draw).outcomes(share, shares)


def _work(share: int, arguments: argparse.Namespace, root: Path) -> None:
    """Do one process's share, and write down what came of it."""
    draw, folder = random.Random(f"{arguments.seed}/{share}"), root / str(share)
    found: list[Iterator[Outcome]] = []
    kills = -(-arguments.points // (len(SCENARIOS) * arguments.jobs))
    for scenario in SCENARIOS:
        if not arguments.only or scenario.name in arguments.only:
            found.append(outcomes_of(scenario, folder, kills, draw))
    if not arguments.only or "ray" in arguments.only:
        found.append(on_ray(folder, draw, share, arguments.jobs))
    with (root / f"{share}.jsonl").open("w") as file:
        for outcomes in found:
            for outcome in outcomes:
                file.write(json.dumps(asdict(outcome)) + "\n")
                file.flush()


def main() -> None:
    """Do the campaign, and print its table or write it to a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--points", type=int, default=120, help="kills at file operations and times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="how many processes")
    parser.add_argument("--only", nargs="+", metavar="COMMAND", help=f"{', '.join(s.name for s in SCENARIOS)}, ray")
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--folder", type=Path, help="a new folder to work in, which is kept")
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="faults-") as temporary:
        root = arguments.folder.absolute() if arguments.folder else Path(temporary)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        warm_up(root / "warm")
        children = []
        for share in range(arguments.jobs):
            child = os.fork()
            if child == 0:
                try:
                    _work(share, arguments, root)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        ends = [os.waitpid(child, 0)[1] for child in children]
        lines = [line for path in sorted(root.glob("*.jsonl")) for line in path.read_text().splitlines()]
        text = table([Outcome(**json.loads(line)) for line in lines])
    if arguments.out:
        arguments.out.write_text(text)
    print(text)
    if any(ends):
        raise SystemExit("a process of the campaign failed")


if __name__ == "__main__":
    main()
