"""What does it take to accumulate Gram matrices, block by block, beside a bare forward of the same placement?

    python -m tests.benchmarks.gram_speed [--size 1.1B] [--samples 64] [--tokens 256]
        [--dtype bfloat16] [--threads 2] [--rounds 1] [--only bare,gram] [--folder DIR]

Makes a seeded Llama-shaped checkpoint (1.1B parameters in bfloat16, unless the size says otherwise) and runs the same
samples through it, block by block: `bare`, with a statistic that looks at nothing, and with `gram`. Both are the same
code otherwise: hidden states go to files, weights stay mapped, totals go to the disk. Every way runs in a process of
its own, after a first pass over one sample that is not timed. Prints medians over rounds, in which the ways take turns,
of wall time, of CPU time (on a busy machine the one to go by, with one thread), and of ratios to bare. Memory is
RssAnon beyond what the process had at first, sampled; below stands the bound: one block, its Gram matrices, and the
activations of one sample.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.statistics.gram import Gram
from sensmerge.tasks.statistics.statistic import Statistic
from tests.benchmarks.memory import watched
from tests.benchmarks.sensitivity_speed import cpu_seconds, samples
from tests.benchmarks.synthetic import SIZES, make_model


@dataclass(frozen=True)
class Nothing(Statistic):
    """A zero for each layer."""

    hook = "inputs"
    by = "layer"

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return torch.zeros((), dtype=torch.float64)


WAYS: dict[str, Statistic] = {"bare": Nothing(), "gram": Gram()}


def measure(source: Source, way: str, count: int, tokens: int) -> dict[str, float]:
    """Run all samples through the network block by block, watched or not."""
    batches = samples(count, tokens)

    def check(number: int, loss: float) -> None: ...

    with (
        tempfile.TemporaryDirectory(dir=source.folder) as scratch,
        watched(lambda: [psutil.Process()]) as own,
        open_runner(source, "streamed", Path(scratch), {way: WAYS[way]}) as runner,
    ):
        list(runner.run(batches[:1], check))
        begin, cpu = time.perf_counter(), cpu_seconds(actors=False)
        found = dict(runner.run(batches, check))
        seconds, cpu = time.perf_counter() - begin, cpu_seconds(actors=False) - cpu
        written = sum(path.stat().st_size for path in Path(scratch).rglob("*.safetensors"))
    assert len(found) == count
    return {"seconds": seconds, "cpu": cpu, "memory": own.largest - own.first, "written": written}


def bound(source: Source, tokens: int) -> str:
    """Return one block + its Gram matrices + activations of one sample, in words."""
    base, config, size = source.expert.base, source.expert.config, source.dtype.itemsize
    block = size * sum(base.info(name).numel for name in base.weights if "layers.0." in name)
    # Of what queries, keys and values share; of the attention's output; of what gate and up share; of down.
    widths = [config.hidden_size] * 3 + [config.intermediate_size]
    grams = sum(Gram().held_bytes((width,)) for width in widths)
    in_block = tokens * size * (12 * config.hidden_size + 4 * config.intermediate_size)
    in_head = tokens * config.vocab_size * (size + 2 * 4)  # logits, and in float32 logits and their softmax
    activations = max(in_block, in_head)
    words = f"one block {_mb(block)} + Gram matrices {_mb(grams)} + activations {_mb(activations)}"
    return f"{words} = {_mb(block + grams + activations)}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.1B", choices=SIZES)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="bare,gram")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sensmerge-benchmarks")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # what one of its processes does
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.size / "base"
    source = Source(folder, folder, "experts.synthetic", "causal_lm", getattr(torch, arguments.dtype), "cpu")
    if arguments.way:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(source, arguments.way, arguments.samples, arguments.tokens)))
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_model(folder, SIZES[arguments.size], expert=None)
    ways = arguments.only.split(",")
    rounds: list[dict[str, dict[str, float]]] = [{} for _ in range(arguments.rounds)]
    command = [sys.executable, "-m", "tests.benchmarks.gram_speed", *sys.argv[1:], "--way"]
    for results in rounds:
        for way in ways:
            done = subprocess.run([*command, way], check=True, capture_output=True)
            results[way] = json.loads(done.stdout.splitlines()[-1])

    def median(way: str, key: str, over: str | None = None) -> float:
        return statistics.median(results[way][key] / (results[over][key] if over else 1) for results in rounds)

    parameters = sum(info.numel for info in source.expert.base.checkpoint.tensors.values())
    print(
        f"{parameters / 1e9:.2f}B, {arguments.dtype}, {arguments.samples} samples of {arguments.tokens} tokens, "
        f"{arguments.threads} threads, {arguments.rounds} rounds"
    )
    print("| | wall | CPU | wall ÷ bare | CPU ÷ bare | anonymous memory | written |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for way in ways:
        ratios = [f"{median(way, key, 'bare'):.2f}" if "bare" in ways else "" for key in ("seconds", "cpu")]
        times = f"{median(way, 'seconds'):.1f} s | {median(way, 'cpu'):.1f} s"
        sizes = f"{_mb(median(way, 'memory'))} | {_mb(median(way, 'written'))}"
        print(f"| {way} | {times} | {' | '.join(ratios)} | {sizes} |")
    print(f"\nmemory of gram, at most: {bound(source, arguments.tokens)}")


if __name__ == "__main__":
    main()
