import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sensmerge.tasks.artifacts import canonical, read_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.statistics.statistic import Statistic, read_tensor
from tests.conftest import (
    calibration_set,
    llama_config,
    make_adapter,
    make_bert_expert,
    make_bert_trunk,
    make_gpt2,
    make_llama,
    measure_sensitivity,
    perturbed,
    statistics_job,
)

Save = Callable[..., Path]
ROWS: list[Row] = [
    {"prompt": "1+2=", "completion": "3"},
    {"prompt": "The quick brown fox", "completion": " jumps over"},
    {"prompt": "x", "completion": "yz"},
]
TEXTS: list[Row] = [{"text": "so good", "label": 1}, {"text": "bad, very bad indeed", "label": 0}]


def measure(base: Path, expert: Path, task: RowTask, rows: list[Row], out: Path) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    found = statistics_job(base, expert, calibration_set(task, rows, out.parent / "rows")).finish(out)
    written: dict[str, Any] = read_json(out / "sensitivity.json")
    assert found == {"samples": written["samples"], "tokens": written["tokens"]}
    return written


def layer(name: str, prefix: str) -> str:
    """The module path up to its first number, or without the parameter where it has none."""
    parts = name.removeprefix(prefix).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


def naive(
    network: PreTrainedModel,
    losses: Callable[[PreTrainedModel, Row], torch.Tensor],
    rows: list[Row],
    prefix: str = "",
    without: tuple[str, ...] = (),
) -> dict[str, float]:
    """Σ over parameters of |p · gradient| by layer, mean over rows, all gradients in memory, float64."""
    network = network.double().eval()
    totals: dict[str, float] = {}
    for row in rows:
        network.zero_grad()
        losses(network, row).backward()
        for name, parameter in network.named_parameters():
            if not name.startswith(without):
                assert parameter.grad is not None
                key = layer(name, prefix)
                change = float((parameter.detach() * parameter.grad).abs().sum())
                totals[key] = totals.get(key, 0.0) + change / len(rows)
    return totals


def completion_loss(tokenizer: PreTrainedTokenizerFast, loss_on: str) -> Callable[..., torch.Tensor]:
    """Cross-entropy written out: token t is predicted from those before it."""

    def loss(network: PreTrainedModel, row: Row) -> torch.Tensor:
        ids = torch.tensor(tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id])
        first = len(row["prompt"]) if loss_on == "completion" else 1  # one token per byte
        return cross_entropy(network(ids[None]).logits[0, first - 1 : -1], ids[first:])

    return loss


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool, loss_on: str, save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = save(make_llama(tie_word_embeddings=tied), "base", tmp_path)
    expert = save(perturbed(make_llama(tie_word_embeddings=tied), 1), "expert", tmp_path)
    found = measure(base, expert, CompletionTask(kind="completion", loss_on=loss_on), ROWS, tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(expert)
    expected = naive(network, completion_loss(tokenizer, loss_on), ROWS)
    assert found["sensitivity"] == pytest.approx(expected, rel=1e-4)
    layers = {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"}
    assert set(expected) == layers | (set() if tied else {"lm_head"})
    assert found["samples"] == 3
    assert found["tokens"] == sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in ROWS)


def test_gpt2(save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = save(make_gpt2(), "base", tmp_path)
    expert = save(perturbed(make_gpt2(), 1), "expert", tmp_path)
    found = measure(base, expert, CompletionTask(kind="completion"), ROWS, tmp_path / "out")
    expected = naive(AutoModelForCausalLM.from_pretrained(expert), completion_loss(tokenizer, "completion"), ROWS)
    assert found["sensitivity"] == pytest.approx(expected, rel=1e-4)
    assert set(expected) == {f"transformer.{name}" for name in ("wte", "wpe", "h.0", "h.1", "ln_f")}


def class_loss(tokenizer: PreTrainedTokenizerFast) -> Callable[..., torch.Tensor]:
    def loss(network: PreTrainedModel, row: Row) -> torch.Tensor:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        return cross_entropy(network(ids).logits, torch.tensor([row["label"]]))

    return loss


def test_classifier_without_its_head(
    berts: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = measure(berts["base"], berts["mood"], ClassificationTask(kind="classification"), TEXTS, tmp_path)
    network = AutoModelForSequenceClassification.from_pretrained(berts["mood"])
    expected = naive(network, class_loss(tokenizer), TEXTS, "bert.", ("classifier.",))
    assert found["sensitivity"] == pytest.approx(expected, rel=1e-4)
    assert {"encoder.layer.0", "encoder.layer.1", "embeddings.LayerNorm", "pooler.dense"} <= set(expected)
    assert not any("classifier" in name for name in expected)


def test_classifier_with_a_decoder_trunk(save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    adapter = make_adapter(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3),
        tmp_path / "adapter",
        1,
        task_type="SEQ_CLS",
        target_modules=["q_proj", "up_proj"],
    )
    found = measure(base, adapter, ClassificationTask(kind="classification"), TEXTS, tmp_path / "out")
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    network = PeftModel.from_pretrained(network, adapter).merge_and_unload()
    for parameter in network.parameters():
        parameter.requires_grad_()
    expected = naive(network, class_loss(tokenizer), TEXTS, without=("score.",))
    assert found["sensitivity"] == pytest.approx(expected, rel=1e-4)


def test_adapter_is_its_merged_checkpoint(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    adapter = make_adapter(make_llama(), tmp_path / "adapter", 1, target_modules="all-linear", use_rslora=True)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    full = save(merged, "full", tmp_path)
    task = CompletionTask(kind="completion")
    found, expected = (measure(base, expert, task, ROWS, tmp_path / "out") for expert in (adapter, full))
    assert found["sensitivity"] == pytest.approx(expected["sensitivity"], rel=1e-4)


def test_multiple_choice_counts_the_right_choice(llamas: dict[str, Path], tmp_path: Path) -> None:
    choices = MultipleChoiceTask(kind="multiple_choice")
    rows: list[Row] = [{"prompt": "1+1", "choices": ["3", "2", "5"], "answer": 1}]
    found = measure(llamas["base"], llamas["math"], choices, rows, tmp_path / "choices")
    plain = CompletionTask(kind="completion", end_token=False)
    same = measure(llamas["base"], llamas["math"], plain, [{"prompt": "1+1", "completion": " 2"}], tmp_path / "plain")
    assert found == same


def test_no_gradient_no_sensitivity(save: Save, tmp_path: Path) -> None:
    trunk = make_bert_trunk()
    expert = make_bert_expert(trunk, 1, 2)
    with torch.no_grad():
        expert.classifier.weight.zero_()
    task = ClassificationTask(kind="classification")
    found = measure(save(trunk, "base", tmp_path), save(expert, "expert", tmp_path), task, TEXTS, tmp_path / "out")
    assert set(found["sensitivity"].values()) == {0.0}


def test_a_loss_that_is_no_number(save: Save, llamas: dict[str, Path], tmp_path: Path) -> None:
    expert = make_llama()
    with torch.no_grad():
        expert.model.norm.weight.fill_(math.nan)
    with pytest.raises(InputError, match=r"tasks\.math\.calibration: the loss of experts\.math on row 0 is nan"):
        measure(
            llamas["base"], save(expert, "expert", tmp_path), CompletionTask(kind="completion"), ROWS, tmp_path / "out"
        )


def test_one_gradient_at_a_time(llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first block runs backward, no later parameter's gradient is still held."""
    held: list[int] = []
    forward = LlamaModel.forward

    def watched(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        def count(_: torch.Tensor) -> None:
            held.append(sum(parameter.grad is not None for parameter in self.parameters()))

        output = forward(self, *args, **kwargs)
        output.last_hidden_state.register_hook(count)
        for block in self.layers:
            block.input_layernorm.weight.register_hook(count)
        return output

    monkeypatch.setattr(LlamaModel, "forward", watched)
    measure(llamas["base"], llamas["math"], CompletionTask(kind="completion"), ROWS[:1], tmp_path)
    assert len(held) == 3
    assert max(held) <= 1


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_what_routers_add_to_the_loss_is_left_out(
    placement: Placement, save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """No block by itself could tell it; so it is left out everywhere."""
    settings = llama_config(tie_word_embeddings=False).to_dict() | {"num_local_experts": 4, "model_type": "mixtral"}
    network = MixtralForCausalLM(MixtralConfig(**settings, output_router_logits=True, router_aux_loss_coef=1.0))
    base = save(network, "base", tmp_path)
    expert = save(perturbed(network, 1), "expert", tmp_path)
    (tmp_path / "out").mkdir()
    task = CompletionTask(kind="completion")
    found = measure_sensitivity(base, expert, task, ROWS, tmp_path / "out", placement=placement)
    plain = AutoModelForCausalLM.from_pretrained(expert, experts_implementation="eager")  # which takes float64
    expected = naive(plain, completion_loss(tokenizer, "completion"), ROWS)
    assert found == pytest.approx(expected, rel=1e-4)


@dataclass(frozen=True)
class Outer(Statistic):
    """Σ x xᵀ of the inputs of every linear layer, times a factor."""

    hook = "inputs"
    by = "tensor"
    factor: float = 1.0

    def of(self, parameter: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """See `Statistic`."""
        return self.factor * (seen.double().T @ seen.double())


@dataclass(frozen=True)
class OuterAgain(Outer):
    """The same with other results than before."""

    version = 2


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_totals_are_read_by_tensor(placement: Placement, llamas: dict[str, Path], tmp_path: Path) -> None:
    calibration = calibration_set(CompletionTask(kind="completion"), ROWS, tmp_path / "rows")
    job = statistics_job(llamas["base"], llamas["math"], calibration, placement=placement)
    job = replace(job, statistics={**job.statistics, "outer": Outer(2.0)})
    (tmp_path / "out").mkdir()
    about = job.finish(tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(llamas["math"])
    expected = torch.zeros(32, 32, dtype=torch.float64)

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().double()
        expected.add_(2 * torch.einsum("bti,btj->ij", x, x))

    network.model.layers[1].self_attn.q_proj.register_forward_pre_hook(see)
    tokenizer = AutoTokenizer.from_pretrained(llamas["base"])
    for row in ROWS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        network(torch.tensor([ids]))
    found = read_tensor(tmp_path / "out", "outer", "model.layers.1.self_attn.q_proj.weight")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert read_tensor(tmp_path / "out", "outer", "model.layers.1.input_layernorm.weight") is None
    written = read_json(tmp_path / "out" / "outer.json")
    assert written.items() >= about.items()
    assert read_json(tmp_path / "out" / "sensitivity.json").keys() == {"sensitivity", *about}


def test_matrices_without_a_total_are_listed(save: Save, tmp_path: Path) -> None:
    """GPT-2's head is its embedding, and sees inputs; its table of positions sees none."""
    base = save(make_gpt2(), "base", tmp_path)
    expert = save(perturbed(make_gpt2(), 1), "expert", tmp_path)
    calibration = calibration_set(CompletionTask(kind="completion"), ROWS, tmp_path)
    about = statistics_job(base, expert, calibration, ["gram", "fisher"]).finish(tmp_path)
    gram, fisher = (read_json(tmp_path / f"{name}.json") for name in ("gram", "fisher"))
    assert gram["without"] == ["transformer.wpe.weight"]
    assert fisher["without"] == []
    assert {place["tokens"] for place in gram["tensors"].values()} == {about["tokens"]}


def test_what_statistics_are_measured_is_in_the_identity(llamas: dict[str, Path], tmp_path: Path) -> None:
    calibration = calibration_set(CompletionTask(kind="completion"), ROWS, tmp_path)
    job = statistics_job(llamas["base"], llamas["math"], calibration)
    others = [{"outer": Outer()}, {"outer": Outer(2.0)}, {"outer": OuterAgain()}, {"outer": Outer(), **job.statistics}]
    jobs = [job, *(replace(job, statistics=one) for one in others)]
    assert len({canonical(one.identity()) for one in jobs}) == len(jobs)
    assert replace(job, placement="streamed", device="cuda", name="other").identity() == job.identity()


def test_totals_that_are_no_numbers(llamas: dict[str, Path], tmp_path: Path) -> None:
    calibration = calibration_set(CompletionTask(kind="completion"), ROWS, tmp_path)
    job = replace(
        statistics_job(llamas["base"], llamas["math"], calibration), statistics={"outer": Outer(float(10**308))}
    )
    with pytest.raises(InputError, match=r"^experts\.math: outer of tensor \S+ is not finite; try dtype: float32$"):
        job.finish(tmp_path)
