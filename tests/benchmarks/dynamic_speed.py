"""What does an answer with coefficients per sample cost? Side by side with the plain model and with materialising.

    python -m tests.benchmarks.dynamic_speed FOLDER DATA.jsonl.gz … [--batch-size 32] [--rounds 10] [--threads 2]

FOLDER is a dynamic model; DATA are rows with a `text` or `prompt`, mixed. Five ways to answer the same batches take
turns: the plain base, in one forward pass and in the parts of similar length that the dynamic model makes of a batch;
the dynamic model (route and answer); and weights materialised for each sample in two ways, timed on the first samples
of a batch. `in place` adds the task vectors to the network's own memory, `new weights` makes
a state dict and calls the network with it, as FusionBench's WEMoE does. Materialised samples are answered one by one
and given their coefficients. Prints medians of times and ratios, and what loading and answering take of memory.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import torch
from torch.func import functional_call

from sensmerge.tasks.dynamic.folder import parameter_vectors
from sensmerge.tasks.dynamic.model import PADDING, DynamicModel, Routes
from sensmerge.tasks.dynamic.vectors import BASE, Vector
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.networks import load_config, load_tokenizer
from sensmerge.tasks.networks.tokens import Inputs, batches, length

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


def plain(model: DynamicModel, samples: list[Inputs]) -> None:
    """Answer a batch by the base."""
    with torch.inference_mode():
        network = model.network.network
        (network.base_model if model.heads else network)(**model.batch(samples))


def plain_in_parts(model: DynamicModel, samples: list[Inputs]) -> None:
    """Answer a batch by the base, in parts of similar length."""
    for rows in batches([length(sample) for sample in samples], padding=PADDING):
        plain(model, [samples[row] for row in rows])


def dynamic(model: DynamicModel, samples: list[Inputs]) -> Routes:
    """Route and answer a batch."""
    routes = model.route(samples)
    if model.classifies:
        model.class_logits(samples, routes, [model.experts[expert] for expert in routes.experts])
    else:
        model.logits(samples, routes)
    return routes


class Materialised:
    """Two ways to give the network the weights of one sample and answer it by them."""

    def __init__(self, model: DynamicModel, vectors: Mapping[str, Mapping[int, Vector]]) -> None:
        """Keep the base's weights and the task vectors, multiplied out."""
        self.model = model
        self.network = model.network.network
        self.own = {name: parameter.detach().clone() for name, parameter in self.network.named_parameters()}
        self.deltas: list[dict[str, torch.Tensor]] = [
            {name: by_expert[expert].dense() for name, by_expert in vectors.items() if expert in by_expert}
            for expert in range(len(model.experts))
        ]

    def in_place(self, samples: list[Inputs], coefficients: torch.Tensor) -> None:
        """Answer each sample after overwriting what the experts change in the network by its own weights."""
        changed = {name for delta in self.deltas for name in delta}
        parameters = {name: parameter for name, parameter in self.network.named_parameters() if name in changed}
        with torch.inference_mode():
            for sample, row in zip(samples, coefficients.tolist(), strict=True):
                for name, parameter in parameters.items():
                    parameter.data.copy_(self.own[name])
                for delta, coefficient in zip(self.deltas, row, strict=True):
                    for name, values in delta.items():
                        parameters[name].data.add_(values, alpha=coefficient)
                plain(self.model, [sample])
            for name, parameter in parameters.items():
                parameter.data.copy_(self.own[name])

    def new_weights(self, samples: list[Inputs], coefficients: torch.Tensor) -> None:
        """Answer each sample by a state dict of its own."""
        network = self.network.base_model if self.model.heads else self.network
        prefix = f"{self.network.base_model_prefix}." if self.model.heads else ""
        with torch.inference_mode():
            for sample, row in zip(samples, coefficients, strict=True):
                state = dict(self.own)
                for delta, weight in zip(self.deltas, row, strict=True):
                    for name, values in delta.items():
                        state[name] = state[name] + values * weight
                own = {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
                functional_call(network, own, (), self.model.batch([sample]))


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
    tokenizer = load_tokenizer(arguments.folder / BASE)

    def batch(number: int) -> list[Inputs]:
        texts = rows[number * arguments.batch_size : (number + 1) * arguments.batch_size]
        return [{"input_ids": tokenizer(text)["input_ids"][:MAX_TOKENS]} for text in texts]

    found: list[DynamicModel] = []

    def load_and_answer() -> None:
        found.append(DynamicModel.load(arguments.folder, verify=False))
        dynamic(found[0], batch(0))

    load_config(arguments.folder / BASE)  # what is imported at first use is no part of the model
    whole = peak(load_and_answer)
    (model,) = found
    activations = peak(lambda: plain(model, batch(0)))

    vectors = parameter_vectors(
        arguments.folder, open_base(arguments.folder / BASE), model.network.network, model.experts
    )
    materialised = Materialised(model, vectors)

    ways = ("plain", "plain, in parts", "dynamic", "in place", "new weights")
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(arguments.rounds + 1):  # the first round is for warming up
        samples = batch(number)
        routes = dynamic(model, samples)
        few, own_coefficients = samples[:MATERIALISED], routes.coefficients[:MATERIALISED]
        taken = {
            "plain": seconds(lambda batch=samples: plain(model, batch)),
            "plain, in parts": seconds(lambda batch=samples: plain_in_parts(model, batch)),
            "dynamic": seconds(lambda batch=samples: dynamic(model, batch)),
            "in place": seconds(lambda batch=few, rows=own_coefficients: materialised.in_place(batch, rows)),
            "new weights": seconds(lambda batch=few, rows=own_coefficients: materialised.new_weights(batch, rows)),
        }
        for way in ("in place", "new weights"):
            taken[way] *= len(samples) / MATERIALISED
        for way, value in taken.items():
            times[way] += [value] * (number > 0)
    passes, experts = model.passes, len(model.experts)

    def ratio(a: str, b: str) -> float:
        return statistics.median(one / other for one, other in zip(times[a], times[b], strict=True))

    weights = sum(tensor.nbytes for tensor in materialised.own.values())
    compact = sum(vector.nbytes for by_expert in vectors.values() for vector in by_expert.values())
    print(f"{model.router.rule}, K = {experts}, batch {arguments.batch_size}, {arguments.threads} threads")
    print("| | milliseconds per sample (median) |\n| --- | --- |")
    for way, values in times.items():
        print(f"| {way} | {1000 * statistics.median(values) / arguments.batch_size:.2f} |")
    in_parts = ratio("dynamic", "plain, in parts")
    print(f"\ndynamic ÷ plain: {ratio('dynamic', 'plain'):.2f}, in parts {in_parts:.2f}; ", end="")
    print(f"with p = {passes:.2f} probe passes; ", end="")
    print(f"1.25 × (2p + K + 2) = {1.25 * (2 * passes + experts + 2):.2f}, 1.5 × (p + 1) = {1.5 * (passes + 1):.2f}")
    for way in ("in place", "new weights"):
        print(f"{way} ÷ dynamic: {ratio(way, 'dynamic'):.1f}")
    print(f"base {_mb(weights)} + vectors {_mb(compact)} + activations of the plain model {_mb(activations)}; ", end="")
    print(f"loading and answering took {_mb(whole)} at most")


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
