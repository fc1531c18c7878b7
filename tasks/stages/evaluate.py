"""Scores of one model on one task: a record per row (see `tasks.kinds.metrics`), every metric with its interval."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.datasets import (
    ClassificationTask,
    CompletionTask,
    LmEvalTask,
    MultipleChoiceTask,
    Sample,
    Task,
    encode,
    encode_choices,
    find_answer,
    render,
)
from sensmerge.tasks.kinds.lm_eval import evaluate_lm_eval
from sensmerge.tasks.kinds.metrics import Record, score_records
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.blocks import trunk_output
from sensmerge.tasks.networks.expert import Expert, load_network, open_expert
from sensmerge.tasks.networks.generation import generate, set_end_tokens
from sensmerge.tasks.networks.head_inputs import (
    HeadInput,
    fingerprint_of,
    head_input,
    is_little,
    load_head_inputs,
    logits_of,
    save_head_inputs,
)
from sensmerge.tasks.networks.heads import DetachedHead
from sensmerge.tasks.networks.networks import finite, load_tokenizer, trunk_of
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.tokens import pad, pad_token
from sensmerge.tasks.rows.source import Row

VERSION = 2
_HEAD_INPUTS = "head_inputs.safetensors"


def evaluate_network(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: CompletionTask | ClassificationTask | MultipleChoiceTask,
    rows: list[Row],
    key: str,
    device: torch.device | str = "cpu",
) -> list[Record]:
    """Run a network, which is on `device`, over rows and return their records in the order of the rows.

    completion: the expected completion is read, not generated: every token (and the end token, if the task appends it)
    is predicted from the true ones before it. `nll` is −Σ ln p of its tokens, `correct` how many were the likeliest;
    both from float32 log-probabilities. `exact`: see `CompletionTask.generate` and `answer`.
    multiple_choice: the prediction is the choice of the largest Σ ln p ÷ characters of the choice's text, which is
    lm-eval's `acc_norm`.
    classification: the prediction is the class of the largest logit.

    Rows are those that `check_rows` has passed; `key` (`tasks.math.evaluation`) names them in messages. The batch size
    changes no record beyond rounding. Raises InputError as `encode` does, and for logits that are not finite.
    """
    network.eval()
    pad_id = pad_token(network, tokenizer)
    places = [f"row {i} of {key}" for i in range(len(rows))]
    with torch.inference_mode():
        match task:
            case ClassificationTask():
                classes = network.config.label2id
                samples = [
                    encode(task, row, tokenizer, where, classes) for row, where in zip(rows, places, strict=True)
                ]
                return _classify(network, samples, _batch_size(network, task), pad_id, device)
            case MultipleChoiceTask():
                choices = [encode_choices(task, row, tokenizer, where) for row, where in zip(rows, places, strict=True)]
                likelihoods = _likelihoods(network, list(chain(*choices)), task.batch_size, pad_id, device)
                return choose(task, rows, likelihoods)
        samples = [encode(task, row, tokenizer, where) for row, where in zip(rows, places, strict=True)]
        records = _likelihoods(network, samples, task.batch_size, pad_id, device)
        if task.generate:
            for sample, where in zip(samples, places, strict=True):
                if sample.prompt_tokens == 0:
                    raise InputError(f"{where}: the prompt has no token to generate from; set generate: 0")
            prompts = [sample.input_ids[: sample.prompt_tokens] for sample in samples]
            texts = _generate(network, tokenizer, prompts, task, pad_id, device)
            for record, text, row in zip(records, texts, rows, strict=True):
                record["exact"] = int(is_exact(task, text, row))
        return records


def _logits(
    network: PreTrainedModel,
    samples: Sequence[Sample],
    batch_size: int,
    pad_id: int,
    device: torch.device | str,
    **options: Any,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each sample's index and logits, padding included: (T, vocabulary), or (classes,) of a classification head."""
    for chosen in _batches([len(sample.input_ids) for sample in samples], batch_size):
        batch = pad([samples[i].input_ids for i in chosen], pad_id)
        yield from zip(chosen, network(**_to(batch, device), **options).logits, strict=True)


def _likelihoods(
    network: PreTrainedModel, samples: Sequence[Sample], batch_size: int, pad_id: int, device: torch.device | str
) -> list[Record]:
    """Records `nll`, `correct` and `tokens` over the scored tokens of each sample."""
    records: list[Record] = [{}] * len(samples)
    for i, logits in _logits(network, samples, batch_size, pad_id, device, use_cache=False):
        records[i] = likelihood(samples[i], logits)
    return records


def likelihood(sample: Sample, logits: torch.Tensor) -> Record:
    """Return `nll`, `correct` and `tokens` over a sample's scored tokens; logits are (T, vocabulary), padded right."""
    ids, start = sample.input_ids, sample.scored_from
    target = torch.tensor(ids[start:], device=logits.device)
    # Only the scored positions of one sample become float32: a whole batch × vocabulary would be large.
    log_p = logits[start - 1 : len(ids) - 1].float().log_softmax(-1)
    return {
        "nll": -finite(log_p.gather(-1, target[:, None]).sum(dtype=torch.float64)).item(),
        "correct": int((log_p.argmax(-1) == target).sum()),
        "tokens": len(target),
    }


def choose(task: MultipleChoiceTask, rows: list[Row], likelihoods: list[Record]) -> list[Record]:
    """Return records of multiple choice from the likelihoods of all choices of all rows, one after the other."""
    records: list[Record] = []
    one_by_one = iter(likelihoods)
    for row in rows:
        scores = [-next(one_by_one)["nll"] / len(str(choice)) for choice in row[task.choices]]
        records.append({"prediction": scores.index(max(scores)), "label": int(row[task.answer])})
    return records


def _classify(
    network: PreTrainedModel, samples: Sequence[Sample], batch_size: int, pad_id: int, device: torch.device | str
) -> list[Record]:
    records: list[Record] = [{}] * len(samples)
    for i, logits in _logits(network, samples, batch_size, pad_id, device):
        records[i] = {"prediction": int(finite(logits).argmax()), "label": samples[i].label}
    return records


def _batch_size(network: PreTrainedModel, task: ClassificationTask) -> int:
    # A decoder with a classification head finds the last token by the padding id of its config; without one it takes
    # the last of the batch, which is right for a single sample only.
    return task.batch_size if getattr(network.config, "pad_token_id", None) is not None else 1


def _generate(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    task: CompletionTask,
    pad_id: int,
    device: torch.device | str,
) -> list[str]:
    """Greedy continuations as text, each up to an end token of the network (left out) or `task.generate` tokens."""
    texts = [""] * len(prompts)
    for chosen in _batches([len(prompt) for prompt in prompts], task.batch_size):
        batch = [prompts[i] for i in chosen]
        for i, ids in zip(chosen, generate(network, tokenizer, batch, task.generate, pad_id, device), strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def is_exact(task: CompletionTask, text: str, row: Row) -> bool:
    """Return whether a generated text is the row's completion, or holds the same answer (`CompletionTask.answer`)."""
    expected = render(task.completion, row)
    if task.answer is None:
        return text.strip() == expected.strip()
    answer = find_answer(task.answer, text)
    return answer is not None and answer == find_answer(task.answer, expected)


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first: little padding, and no memory surprise at the end."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _to(batch: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def write_evaluation(kind: str, records: list[Record], out: Path) -> dict[str, dict[str, float]]:
    """Write `records.json` and `scores.json` to a folder and return the scores: metric → value, n, low, high."""
    scores = {metric: asdict(score) for metric, score in score_records(kind, records).items()}
    write_json(out / "records.json", records)
    write_json(out / "scores.json", scores)
    return scores


@dataclass(frozen=True)
class Subject:
    """The model that is scored."""

    base: Path
    model: Path
    """folder of the base itself, of a merged model, or of an expert"""
    is_expert: bool
    """whether `model` is to be matched with the base (an adapter, a fine-tune under other tensor names)"""
    head_of: Path | None
    """expert whose head follows the trunk (classification)"""
    label2id: Mapping[str, int] | None = None
    """classes of the task's own expert (classification): rows may name them"""
    trunk: str | None = None
    """fingerprint of what the head reads of its trunk for the evaluation set; None where nothing is to be kept"""
    earlier: Path | None = None
    """an earlier artifact of the same step"""
    base_config: tuple[Path, ...] = ()
    """experts that run with the base's settings where their own configs differ"""


def evaluate(
    subject: Subject, name: str, task: Task, rows: list[Row], tokenizer: Path, dtype: str, device: str, out: Path
) -> dict[str, Any]:
    """Score one model on one task.

    Where the head of an expert follows the trunk of another model, what it reads may be kept, if it is little: a
    changed head on the same trunk is scored without running that again, to the same bits.

    Args:
        subject: the model.
        name: the task's name.
        task: the task.
        rows: the evaluation set (none for lm_eval, which has its own).
        tokenizer: folder of the tokenizer that all models share.
        dtype: torch name of the network's dtype.
        device: torch device.
        out: folder for `records.json` (one per row) and `scores.json` (metric → value, n, low, high).

    Returns:
        The scores.
    """
    reader, key = load_tokenizer(tokenizer), f"tasks.{name}.evaluation"
    if isinstance(task, ClassificationTask) and subject.trunk is not None:
        records = _through_head(subject, name, task, rows, reader, dtype, device, out)
        return write_evaluation(task.kind, records, out)
    network = _network(subject, name, task, dtype, device)
    if isinstance(task, LmEvalTask):
        records = evaluate_lm_eval(network, reader, task, f"tasks.{name}")
    else:
        records = evaluate_network(network, reader, task, rows, key, device)
    return write_evaluation(task.kind, records, out)


def _network(subject: Subject, name: str, task: Task, dtype: str, device: str) -> PreTrainedModel:
    base = open_base(subject.base)
    model = _expert(subject, subject.model, base, name) if subject.is_expert else open_base(subject.model)
    head_of = _expert(subject, subject.head_of, base, name) if subject.head_of else None
    head = "classification" if isinstance(task, ClassificationTask) else "causal_lm"
    network = load_network(model, head, getattr(torch, dtype), device, head_of)
    if subject.label2id is not None:
        network.config.label2id = dict(subject.label2id)
    if head == "causal_lm":
        set_end_tokens(network, subject.model, subject.base)
    return network


def _expert(subject: Subject, folder: Path, base: Base, name: str) -> Expert:
    return open_expert(folder, base, name, base_config=folder in subject.base_config)


def _through_head(
    subject: Subject,
    name: str,
    task: ClassificationTask,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    device: str,
    out: Path,
) -> list[Record]:
    """Return records of classes as `evaluate_network` does, and keep in `out` what the head reads of the trunk."""
    assert subject.head_of is not None
    assert subject.trunk is not None
    trunk, inputs = None, _kept(subject)
    if inputs:
        ending, base_config = "classification", subject.head_of in subject.base_config
        source = Source(subject.base, subject.head_of, name, ending, getattr(torch, dtype), device, base_config)
        head = DetachedHead.read(source)
    else:
        network = _network(subject, name, task, dtype, device)
        trunk, head = trunk_of(network), DetachedHead(network)
    classes = subject.label2id or head.network.config.label2id
    where = f"of tasks.{name}.evaluation"
    samples = [encode(task, row, tokenizer, f"row {i} {where}", classes) for i, row in enumerate(rows)]
    pad_id, batch_size = pad_token(head.network, tokenizer), _batch_size(head.network, task)
    records: list[Record] = [{}] * len(samples)
    batches = _batches([len(sample.input_ids) for sample in samples], batch_size)
    for number, chosen in enumerate(batches):
        batch = pad([samples[i].input_ids for i in chosen], pad_id)
        if trunk is not None:
            with torch.no_grad():
                output = trunk_output(trunk(**_to(batch, device)))
            found = head_input(head, output, batch)
            if is_little(found, batch):
                inputs[number] = found
        else:
            found = inputs[number]
        for i, logits in zip(chosen, logits_of(head, found, batch), strict=True):
            records[i] = {"prediction": int(finite(logits).argmax()), "label": samples[i].label}
    if len(inputs) == len(batches):
        save_head_inputs(inputs, subject.trunk, out / _HEAD_INPUTS)
    return records


def _kept(subject: Subject) -> dict[int, HeadInput]:
    """Return what an earlier artifact has kept of the same trunk; nothing if there is none."""
    file = None if subject.earlier is None else subject.earlier / _HEAD_INPUTS
    if file is None or not file.is_file() or fingerprint_of(file) != subject.trunk:
        return {}
    return load_head_inputs(file)
