"""What does a sensitivity step take in each placement, in time and memory? Beside a bare forward and backward pass.

    python -m tests.benchmarks.sensitivity_speed [--size 1.1B] [--samples 8] [--tokens 256]
        [--dtype bfloat16] [--threads 2] [--rounds 1] [--only bare,whole,streamed,1,2] [--folder DIR]

Makes a seeded Llama-shaped checkpoint (1.1B parameters in bfloat16, unless the size says otherwise) and runs the same
samples through: the whole network forward and backward, with nothing done to the gradients; the step with placement
whole, with `--threads` each; streamed; and with 1 and 2 actors of one thread each. Every way runs in a process of its
own, after a first pass over one sample that is not timed. Loading a network whole is no part of its time, nor is the
start of actors; loading blocks is, while it streams. Prints medians over rounds, in which all ways take turns, of wall
time, of CPU time (on a busy machine the one to go by, with one thread), and of ratios to bare. Memory is RssAnon beyond
what the process had at first, sampled; of actors, the sum of all that they have.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from sensmerge.tasks.networks.blocks import Batch
from sensmerge.tasks.networks.journeys import Measured
from sensmerge.tasks.networks.placement import Actors
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.statistics.sensitivity import Sensitivity
from tests.benchmarks.memory import children, watched
from tests.benchmarks.synthetic import SIZES, make_model


def measured(actors: bool) -> list[psutil.Process]:
    """Return this process, or those of its Ray actors."""
    own = psutil.Process()
    return children(own, "ray::BlockOwner") if actors else [own]


def cpu_seconds(actors: bool) -> float:
    """Return the CPU time that this process, or all its actors, have taken."""
    times = [one.cpu_times() for one in measured(actors)]
    return sum(one.user + one.system for one in times)


def samples(count: int, tokens: int) -> list[Batch]:
    """Return random samples."""
    generator = torch.Generator().manual_seed(1)
    found: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(32_000, (1, tokens), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def bare(source: Source, batches: list[Batch]) -> dict[str, float]:
    """Run the whole network forward and backward; gradients are dropped between samples."""
    with watched(lambda: measured(actors=False)) as peak:
        network = source.network()
        for number, batch in enumerate([batches[0], *batches]):
            if number == 1:
                begin, cpu = time.perf_counter(), cpu_seconds(False)
            network.zero_grad()
            network(**batch).loss.backward()
        seconds, cpu = time.perf_counter() - begin, cpu_seconds(False) - cpu
    return {"seconds": seconds, "cpu": cpu, "memory": peak.largest - peak.first}


def step(source: Source, batches: list[Batch], actors: int, streamed: bool) -> dict[str, float]:
    """Find the sensitivities of all samples in some placement."""
    placement = Actors(actors, 1, 0) if actors else "streamed" if streamed else "whole"
    if actors:
        import ray

        ray.init(address="local", num_cpus=actors, include_dashboard=False, logging_level="ERROR")

    def check(number: int, loss: float) -> None: ...

    found: dict[int, Measured] = {}
    with (
        tempfile.TemporaryDirectory(dir=source.folder) as scratch,
        watched(lambda: measured(actors=False)) as own,
        open_runner(source, placement, Path(scratch), {"sensitivity": Sensitivity()}) as runner,
        watched(lambda: measured(actors=bool(actors))) as peak,
    ):
        list(runner.run(batches[:1], check))
        begin, cpu = time.perf_counter(), cpu_seconds(bool(actors))
        found.update(runner.run(batches, check))
        seconds, cpu = time.perf_counter() - begin, cpu_seconds(bool(actors)) - cpu
    total = sum(value for number in sorted(found) for value in found[number].sums["sensitivity"].values())
    memory = peak.largest if actors else own.largest - own.first
    return {"seconds": seconds, "cpu": cpu, "memory": memory, "total": total}


def bound(source: Source, tokens: int) -> str:
    """Return embedding + head + 3 blocks + activations of one sample, in words."""
    base, config, size = source.expert.base, source.expert.config, source.dtype.itemsize
    outer = size * sum(base.info(name).numel for name in base.weights if "layers." not in name)
    block = size * sum(base.info(name).numel for name in base.weights if "layers.0." in name)
    # In a block: inputs and outputs of its matrices, and their gradients. In the head: logits and their gradient in
    # the network's dtype; logits, softmax, and gradient in float32.
    in_block = 2 * tokens * size * (12 * config.hidden_size + 4 * config.intermediate_size)
    in_head = tokens * config.vocab_size * (2 * size + 3 * 4)
    total = outer + 3 * block + max(in_block, in_head)
    words = f"embedding + head {_mb(outer)} + 3 blocks of {_mb(block)} + activations {_mb(max(in_block, in_head))}"
    return f"{words} = {_mb(total)}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.1B", choices=SIZES)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="bare,whole,streamed,1,2")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sensmerge-benchmarks")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # what one of its processes does
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.size / "base"
    source = Source(folder, folder, "experts.synthetic", "causal_lm", getattr(torch, arguments.dtype), "cpu")
    batches = samples(arguments.samples, arguments.tokens)
    if arguments.way:
        torch.set_num_threads(arguments.threads)
        way = arguments.way
        found = (
            bare(source, batches)
            if way == "bare"
            else step(source, batches, int(way) if way.isdigit() else 0, way == "streamed")
        )
        print(json.dumps(found))
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_model(folder, SIZES[arguments.size], expert=None)
    ways = arguments.only.split(",")
    rounds: list[dict[str, dict[str, float]]] = [{} for _ in range(arguments.rounds)]
    for results in rounds:
        for way in ways:
            threads = ["--threads", "1"] if way.isdigit() else []
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.sensitivity_speed",
                *sys.argv[1:],
                *threads,
                "--way",
                way,
            ]
            results[way] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])

    def median(way: str, key: str, over: str | None = None) -> float:
        return statistics.median(results[way][key] / (results[over][key] if over else 1) for results in rounds)

    parameters = sum(info.numel for info in source.expert.base.checkpoint.tensors.values())
    print(
        f"{parameters / 1e9:.2f}B, {arguments.dtype}, {arguments.samples} samples of {arguments.tokens} tokens, "
        f"{arguments.threads} threads (actors: one each), {arguments.rounds} rounds"
    )
    print("| | wall | CPU | wall ÷ bare | CPU ÷ bare | anonymous memory |\n| --- | --- | --- | --- | --- | --- |")
    for way in ways:
        compared = "bare" in ways and not way.isdigit()
        ratios = [f"{median(way, key, 'bare'):.2f}" if compared else "" for key in ("seconds", "cpu")]
        name = f"{way} actor{'s' if way != '1' else ''}" if way.isdigit() else way
        times = f"{median(way, 'seconds'):.1f} s | {median(way, 'cpu'):.1f} s"
        print(f"| {name} | {times} | {' | '.join(ratios)} | {_mb(median(way, 'memory'))} |")
    if "1" in ways and "2" in ways:
        print(f"\n2 actors ÷ 1 actor: {median('2', 'seconds', '1'):.2f} (wall)")
    print(f"streamed, at most: {bound(source, arguments.tokens)}")
    print("sums:", *(f"{way} {median(way, 'total'):.6g}" for way in ways if way != "bare"))


if __name__ == "__main__":
    main()
