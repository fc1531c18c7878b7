"""How much faster is generation in batches than one by one? Side by side, in rounds that take turns; Markdown.

    python -m tests.benchmarks.generation_speed MODEL DATA [--field text] [--batch-size 16] [--prompts 16]
        [--new-tokens 64] [--rounds 3] [--threads 2] [--dtype float32]

MODEL is the folder of a language model or an encoder-decoder, DATA a JSON Lines file; its first rows are the prompts.
What is timed is how evaluation answers rows, with KV cache, each up to an end token. Prints the median seconds of both,
the median of the rounds' ratios, and how many answers are equal token by token.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import datasets
import torch

from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.kinds.seq2seq import Seq2SeqTask
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import load_network
from sensmerge.tasks.networks.generation import set_end_tokens
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.tokens import class_tokens, tokens
from sensmerge.tasks.stages.answers import NetworkModel


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--field", default="text")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, tokenizer = open_base(arguments.model), load_tokenizer(arguments.model)
    writes = base.config.is_encoder_decoder
    task: RowTask = Seq2SeqTask(kind="seq2seq") if writes else CompletionTask(kind="completion")
    network = load_network(base, task.head, getattr(torch, arguments.dtype), "cpu")
    set_end_tokens(network, arguments.model, arguments.model)
    rows = datasets.load_dataset("json", data_files=str(arguments.data), split="train").select(range(arguments.prompts))
    texts = [str(row[arguments.field]) for row in rows]
    prompts = [
        {"input_ids": class_tokens(text, tokenizer) if writes else tokens(text, tokenizer, front=True)}
        for text in texts
    ]
    models = {
        size: NetworkModel(network, tokenizer, task.model_copy(update={"batch_size": size}))
        for size in (1, arguments.batch_size)
    }
    seconds: dict[int, list[float]] = {size: [] for size in models}
    answers: dict[int, list[str]] = {}
    models[1].generate(prompts[:1], [0], 4)  # what is done once
    for _ in range(arguments.rounds):
        for size, model in models.items():
            begin = time.perf_counter()
            answers[size] = model.generate(prompts, range(len(prompts)), arguments.new_tokens)
            seconds[size].append(time.perf_counter() - begin)
            print(f"batches of {size}: {seconds[size][-1]:.2f} s", file=sys.stderr, flush=True)
    alone, together = seconds.values()
    ratios = sorted(one / other for one, other in zip(alone, together, strict=True))
    equal = sum(one == other for one, other in zip(*answers.values(), strict=True))
    lengths = [len(prompt["input_ids"]) for prompt in prompts]
    written = sum(len(tokens(answer, tokenizer, front=False)) for answer in answers[1])
    print(
        f"{type(network).__name__}, {network.num_parameters() / 1e6:.0f}M parameters, {arguments.dtype}, "
        f"{arguments.threads} threads; {len(prompts)} prompts of {min(lengths)}–{max(lengths)} tokens, {written} "
        f"tokens written, at most {arguments.new_tokens} each; {arguments.rounds} rounds in turns\n"
    )
    print("| | seconds (median) |\n| --- | --- |")
    print(f"| one by one | {statistics.median(alone):.2f} |")
    print(f"| batches of {arguments.batch_size} | {statistics.median(together):.2f} |")
    print(
        f"\none by one ÷ in batches: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
        f"{equal} of {len(prompts)} answers are equal"
    )


if __name__ == "__main__":
    main()
