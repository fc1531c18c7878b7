"""`python -m tests.hostile --count 500`: reads hostile input of every kind of file, and lists what is wrong."""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.hostile.cases import HONEST, made_world, try_one


def main() -> int:
    """Return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of inputs")
    parser.add_argument("--verbose", action="store_true", help="say what became of each input")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        world = Path(folder) / "world"
        world.mkdir()
        made_world(world)
        for number in HONEST:
            what, outcome = try_one(world, options.seed, number)
            if outcome.finding or outcome.status != 0:
                print(f"{what}: as it should be, but refused: {outcome.finding or outcome.said}", flush=True)
                results["found"] += 1
        for number in options.only if options.only is not None else range(options.count):
            what, outcome = try_one(world, options.seed, number)
            result = "found" if outcome.finding else "accepted" if outcome.status == 0 else "refused"
            results[result] += 1
            if outcome.finding:
                print(f"{number}: {what}: {outcome.finding}", flush=True)
            elif options.verbose:
                print(f"{number}: {what}: {outcome.said.strip() or 'accepted'}", flush=True)
            if options.only is not None:
                print(outcome.status, outcome.said, *outcome.breaches, sep="\n")
    print(", ".join(f"{count} {result}" for result, count in sorted(results.items())))
    return bool(results["found"])


if __name__ == "__main__":
    sys.exit(main())
