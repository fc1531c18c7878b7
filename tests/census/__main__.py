"""`python -m tests.census`: what is right, refused, failing or wrong for transformers' causal language models."""

import argparse
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty

import torch
import transformers

from tests.census import se, sens
from tests.census.cases import Column, make_case
from tests.census.zoo import class_names

COLUMNS: Mapping[str, Column] = {
    "sens whole": sens.whole,
    "sens streamed": sens.streamed,
    "distances": sens.distances,
    "SE full": se.full,
    "SE LoRA": se.lora,
}
HEADING = """# Architectures

What `python -m tests.census` finds with transformers {version}: of every causal language model that it has, a tiny
random network is made, with two full fine-tunes and two LoRA adapters where these are looked at.

| column | what is compared |
| --- | --- |
| sens whole | sensitivities by layer, with gradients of plain autograd |
| sens streamed | the same, of a network that runs block by block |
| distances | distances of the experts' logits, with those of whole networks |
| SE full | logits and greedy continuations of a batch of mixed coefficients, with weights written out for each sample |
| SE LoRA | the same, of adapters of the linear layers |

*Right* is equal but for the rounding of float32. *Refused* are architectures that `plan` names, with the recipe's key
and a way out. *Failed* would be those that are accepted and then fail, *wrong* those that give other numbers without a
word.

"""
STATUSES = ("right", "refused", "failed", "wrong")
LIMIT = 300
"""Seconds for one architecture."""


def census(name: str, columns: Sequence[str]) -> dict[str, str]:
    """Return what each column says of an architecture, or `tiny`: why there is no tiny network of it."""
    with tempfile.TemporaryDirectory(prefix="census-") as folder:
        try:
            case = make_case(name, Path(folder), lora=any("LoRA" in column for column in columns))
        except Exception as error:
            return {"tiny": f"{type(error).__name__}: {error}"}
        # Messages name files: without the folder that is gone when they are read.
        return {column: COLUMNS[column](case).replace(f"{folder}/", "") for column in columns}


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


def table(found: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> str:
    """Return Markdown: totals, a row per architecture, and a line for everything that is not right."""
    tried = {name: one for name, one in found.items() if "tiny" not in one}
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    counts = {column: Counter(one[column].partition(":")[0] for one in tried.values()) for column in columns}
    lines += [
        f"| {status} | " + " | ".join(str(counts[column][status]) for column in columns) + " |" for status in STATUSES
    ]
    lines += ["", "| architecture | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, one in tried.items():
        lines.append(f"| {name} | " + " | ".join(one[column].partition(":")[0] for column in columns) + " |")
    lines += ["", "Not right:", ""]
    for name, one in tried.items():
        lines += [
            f"- {name}, {column}: {' '.join(said.split())[:300]}" for column, said in one.items() if said != "right"
        ]
    lines += ["", "Not tried:", ""]
    lines += [f"- {name}: {' '.join(one['tiny'].split())[:150]}" for name, one in found.items() if "tiny" in one]
    return HEADING.format(version=transformers.__version__) + "\n".join(lines) + "\n"


def main() -> None:
    """Take the census and print it as Markdown, or write it to a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.census", description=__doc__)
    parser.add_argument("--only", nargs="+", default=class_names(), metavar="NAME", help="classes of networks")
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        answers = pool.map(lambda name: in_a_process(name, arguments.columns), arguments.only)
        found = dict(zip(arguments.only, answers, strict=True))
    text = table(found, arguments.columns)
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
