"""`python -m tests.census`: what is right, refused, failing or wrong for transformers' causal language models.

With `--zoo`: for architectures of all kinds. Both renew their tables in docs/architectures.md.
"""

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty

import torch
import transformers

from tests.census.columns import COLUMNS, OF_THE_ZOO, census
from tests.census.networks import class_names
from tests.census.tables import CAUSAL, ZOO, causal_table, zoo_table
from tests.census.zoo import FAMILIES

LIMIT = 300
"""Seconds for one architecture."""


def in_a_process(name: str, columns: Sequence[str]) -> dict[str, str]:
    """Return `census` of an architecture, from a process of its own that has `LIMIT` seconds."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=lambda: answers.put(census(name, columns)))
    process.start()
    try:
        found: dict[str, str] = answers.get(timeout=LIMIT)
    except Empty:
        process.kill()
        found = dict.fromkeys(columns, f"failed: no answer in {LIMIT} s")
    process.join()
    return found


def main() -> None:
    """Take the census and renew a table of docs/architectures.md, or print one of what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.census", description=__doc__)
    parser.add_argument("--zoo", action="store_true", help="architectures of all kinds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="classes of networks; their table is printed")
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), help="what is tried; the table is printed")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = [name for family in FAMILIES.values() for name in family] if arguments.zoo else class_names()
    names = arguments.only or names
    columns = arguments.columns or (OF_THE_ZOO if arguments.zoo else list(COLUMNS))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        answers = pool.map(lambda name: in_a_process(name, columns), names)
        found = dict(zip(names, answers, strict=True))
    if arguments.only or arguments.columns:
        print(causal_table(found, columns))
        return
    block, table = (ZOO, zoo_table) if arguments.zoo else (CAUSAL, causal_table)
    block.path.write_text(block.page_with(table(found, columns)))


if __name__ == "__main__":
    main()
