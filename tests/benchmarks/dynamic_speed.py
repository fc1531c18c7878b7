"""What does an answer with coefficients per sample cost? Side by side with the plain model and with materialising.

    python -m tests.benchmarks.dynamic_speed FOLDER DATA.jsonl.gz … [--batch-size 32] [--rounds 10] [--threads 2]

FOLDER is a dynamic model; DATA are rows with a `text` or `prompt`, mixed. Three ways to answer the same batches take
turns: the plain base, the dynamic model (route and answer), and weights materialised for each sample, timed on the
first samples of a batch. Prints medians of times and ratios, and what loading and answering take of memory.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch

from tasks.dynamic_folder import parameter_vectors
from tasks.dynamic_model import DynamicModel, Routes
from tasks.models.expert import open_base
from tasks.models.networks import load_config, load_tokenizer

MATERIALISED = 4
"""Samples per batch that are answered by weights of their own."""
MAX_TOKENS = 64


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def memory(field: str) -> int:
    """Return this process's resident memory in bytes: `VmRSS` now, `VmHWM` the largest since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(work: Callable[[], object]) -> int:
    """Return by how many bytes a call raises the resident memory at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    work()
    return max(0, memory("VmHWM") - before)


def plain(model: DynamicModel, sequences: list[list[int]]) -> None:
    """Answer a batch by the base."""
    with torch.inference_mode():
        network = model.network.network
        (network.base_model if model.heads else network)(**model.batch(sequences))


def dynamic(model: DynamicModel, sequences: list[list[int]]) -> Routes:
    """Route and answer a batch."""
    routes = model.route(sequences)
    if model.classifies:
        model.class_logits(sequences, routes, [model.experts[expert] for expert in routes.experts])
    else:
        model.logits(sequences, routes)
    return routes


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        row.get("text") or row["prompt"]
        for path in arguments.data
        for row in datasets.load_dataset("json", data_files=path, split="train").to_list()
    ]
    random.Random(0).shuffle(rows)
    tokenizer = load_tokenizer(arguments.folder)

    def batch(number: int) -> list[list[int]]:
        texts = rows[number * arguments.batch_size : (number + 1) * arguments.batch_size]
        return [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]

    found: list[DynamicModel] = []

    def load_and_answer() -> None:
        found.append(DynamicModel.load(arguments.folder, verify=False))
        dynamic(found[0], batch(0))

    load_config(arguments.folder)  # what is imported at first use is no part of the model
    whole = peak(load_and_answer)
    (model,) = found
    activations = peak(lambda: plain(model, batch(0)))

    network = model.network.network
    own = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    vectors = parameter_vectors(arguments.folder, open_base(arguments.folder), network, model.experts)

    def materialised(sequences: list[list[int]], coefficients: torch.Tensor) -> None:
        with torch.inference_mode():
            for sequence, row in zip(sequences, coefficients, strict=True):
                for name, parameter in network.named_parameters():
                    parameter.data.copy_(own[name])
                    for expert, vector in vectors.get(name, {}).items():
                        parameter.data.add_(vector.dense(), alpha=float(row[expert]))
                plain(model, [sequence])
            for name, parameter in network.named_parameters():
                parameter.data.copy_(own[name])

    times: dict[str, list[float]] = {"plain": [], "dynamic": [], "materialised": []}
    for number in range(arguments.rounds + 1):  # the first round is for warming up
        sequences = batch(number)
        routes = dynamic(model, sequences)
        few, own_coefficients = sequences[:MATERIALISED], routes.coefficients[:MATERIALISED]
        taken = {
            "plain": seconds(lambda batch=sequences: plain(model, batch)),
            "dynamic": seconds(lambda batch=sequences: dynamic(model, batch)),
            "materialised": seconds(lambda batch=few, rows=own_coefficients: materialised(batch, rows))
            * len(sequences)
            / MATERIALISED,
        }
        for way, value in taken.items():
            times[way] += [value] * (number > 0)
    passes, experts = model.passes, len(model.experts)
    ratio = statistics.median(a / b for a, b in zip(times["dynamic"], times["plain"], strict=True))
    gain = statistics.median(a / b for a, b in zip(times["materialised"], times["dynamic"], strict=True))
    weights = sum(tensor.nbytes for tensor in own.values())
    compact = sum(vector.nbytes for by_expert in vectors.values() for vector in by_expert.values())
    print(f"{model.router.rule}, K = {experts}, batch {arguments.batch_size}, {arguments.threads} threads")
    print("| | milliseconds per sample (median) |\n| --- | --- |")
    for way, values in times.items():
        print(f"| {way} | {1000 * statistics.median(values) / arguments.batch_size:.2f} |")
    print(f"\ndynamic ÷ plain: {ratio:.2f} with p = {passes:.2f} probe passes; ", end="")
    print(f"1.25 × (2p + K + 2) = {1.25 * (2 * passes + experts + 2):.2f}, 1.5 × (p + 1) = {1.5 * (passes + 1):.2f}")
    print(f"materialised ÷ dynamic: {gain:.1f}")
    print(f"base {_mb(weights)} + vectors {_mb(compact)} + activations of the plain model {_mb(activations)}; ", end="")
    print(f"loading and answering took {_mb(whole)} at most")


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
