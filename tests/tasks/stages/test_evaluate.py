import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.lm_eval import LmEvalTask
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.kinds.scores import Record
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.stages.evaluate import EvaluateJob, evaluate_network, write_evaluation
from tests.conftest import make_bert_expert, make_bert_trunk, perturbed, stored

KEY = "tasks.math.evaluation"
WORDS = [f"w{i}" for i in range(90)] + ["elephant", "zebra"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def network(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random causal network whose predictions depend on the whole context."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, **SIZES))


@pytest.fixture(scope="module")
def successor(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A network without context: after token i it gives the logit 10 to token i + 1 and 0 to the others."""
    n = len(tokenizer)
    config = LlamaConfig(vocab_size=n, hidden_size=n + n % 2, num_hidden_layers=1, num_attention_heads=1)
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        network.model.layers[0].self_attn.o_proj.weight.zero_()
        network.model.layers[0].mlp.down_proj.weight.zero_()
        network.model.embed_tokens.weight.copy_(torch.eye(n, config.hidden_size))
        # The final norm scales a one-hot vector to length √hidden_size.
        shifted = torch.eye(n, config.hidden_size).roll(1, dims=0)
        network.lm_head.weight.copy_(shifted * 10 / math.sqrt(config.hidden_size))
    return network


def words(seed: int, n: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())


def text_rows(n: int) -> list[Row]:
    return [{"prompt": words(i, 1 + 5 * i % 13), "completion": words(100 + i, 1 + 3 * i % 7)} for i in range(n)]


def log_p(network: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """ln p of each token of one text but the first, in float64."""
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0].double()
    chosen = logits[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return chosen - logits[:-1].logsumexp(-1)


# Completion


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("end_token", [True, False])
def test_completion_is_that_of_one_sample_at_a_time(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int, end_token: bool
) -> None:
    rows = text_rows(10)
    task = CompletionTask(kind="completion", completion=" {completion}", batch_size=batch_size, end_token=end_token)
    records = evaluate_network(network, tokenizer, task, rows, KEY)
    for row, record in zip(rows, records, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        completion += [tokenizer.eos_token_id] if end_token else []
        ids = prompt + completion
        with torch.no_grad():
            guesses = network(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        expected = -log_p(network, ids)[len(prompt) - 1 :].sum().item()
        assert record["nll"] == pytest.approx(expected, rel=1e-5)
        assert record["tokens"] == len(completion)
        assert record["correct"] == int((guesses == torch.tensor(completion)).sum())


def test_completion_in_closed_form(successor: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "w1 w2", "completion": "w3 w4"}, {"prompt": "w5", "completion": "w6 w9 w10 w12"}]
    task = CompletionTask(kind="completion", end_token=False)
    total = math.log(math.exp(10) + len(tokenizer) - 1)
    right, wrong = total - 10, total
    records = evaluate_network(successor, tokenizer, task, rows, KEY)
    assert [record["correct"] for record in records] == [2, 2]
    assert records[0]["nll"] == pytest.approx(2 * right, rel=1e-3)
    assert records[1]["nll"] == pytest.approx(2 * right + 2 * wrong, rel=1e-4)


def test_long_rows_are_cut(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "w1", "completion": words(0, 9)}, {"prompt": words(1, 7), "completion": "w2"}]
    task = CompletionTask(kind="completion", max_length=6)
    assert [record["tokens"] for record in evaluate_network(network, tokenizer, task, rows, KEY)] == [4, 2]


def test_broken_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES))
    torch.nn.init.constant_(network.model.norm.weight, torch.nan)
    with pytest.raises(InputError, match="NaN or infinite logits"):
        evaluate_network(network, tokenizer, CompletionTask(kind="completion"), text_rows(1), KEY)


# Generation


def test_exact_match_of_a_known_generation(successor: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    # After the last word of the vocabulary comes the end token.
    rows = [
        {"prompt": "w88", "completion": "w89 elephant zebra"},
        {"prompt": "w1 w2 w87", "completion": " w88 w89 elephant zebra\n"},
        {"prompt": "w88", "completion": "w89 elephant"},
        {"prompt": "w1", "completion": "w2 w3"},
    ]
    settings: dict[str, Any] = {"kind": "completion", "batch_size": 3}
    exact = evaluate_network(successor, tokenizer, CompletionTask(**settings, generate=8), rows, KEY)
    assert [record["exact"] for record in exact] == [1, 1, 0, 0]
    short = evaluate_network(successor, tokenizer, CompletionTask(**settings, generate=2), rows, KEY)
    assert [record["exact"] for record in short] == [0, 0, 1, 1]
    # The last w-number of the generation: w89, w89, w89, w9.
    last = CompletionTask(**settings, generate=8, answer=r"w(\d+)")
    assert [r["exact"] for r in evaluate_network(successor, tokenizer, last, rows, KEY)] == [1, 1, 1, 0]
    assert "exact" not in evaluate_network(successor, tokenizer, CompletionTask(**settings), rows, KEY)[0]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_plain_greedy_whatever_the_checkpoint_asks(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": row["prompt"]} for row in text_rows(6)]
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        row["completion"] = tokenizer.decode(ids[start:], skip_special_tokens=True)
    own = GenerationConfig(do_sample=True, repetition_penalty=9.0, no_repeat_ngram_size=1)
    monkeypatch.setattr(network, "generation_config", own)
    task = CompletionTask(kind="completion", generate=6, batch_size=batch_size)
    assert [r["exact"] for r in evaluate_network(network, tokenizer, task, rows, KEY)] == [1] * len(rows)
    assert network.generation_config is own


def test_generation_needs_a_prompt(successor: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="</s>", pad_token="<pad>"
    )
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    task = CompletionTask(kind="completion", generate=2)
    with pytest.raises(InputError, match=r"row 0 of tasks\.math\.evaluation: the prompt has no token"):
        evaluate_network(successor, bare, task, [{"prompt": "", "completion": "w1 w2"}], KEY)


# Multiple choice


@pytest.mark.parametrize("batch_size", [1, 5])
def test_choices_are_ranked_by_likelihood_per_character(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    rows = [
        {
            "prompt": words(i, 4),
            "choices": [words(10 * i + j, 1 + (i + j) % 4) for j in range(2 + i % 3)],
            "answer": i % 2,
        }
        for i in range(8)
    ]
    task = MultipleChoiceTask(kind="multiple_choice", batch_size=batch_size)
    records = evaluate_network(network, tokenizer, task, rows, KEY)
    for row, record in zip(rows, records, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = prompt + tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            scores.append(log_p(network, ids)[len(prompt) - 1 :].sum().item() / len(choice))
        assert record == {"prediction": max(range(len(scores)), key=scores.__getitem__), "label": row["answer"]}
    assert len({record["prediction"] for record in records}) > 1


def test_a_longer_word_of_equal_likelihood_wins(
    successor: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"prompt": "w1", "choices": ["w9", "elephant", "zebra"], "answer": 0}
    task = MultipleChoiceTask(kind="multiple_choice")
    assert evaluate_network(successor, tokenizer, task, [row], KEY) == [{"prediction": 1, "label": 0}]


# Classification


def text_classes(n: int) -> list[Row]:
    return [{"text": words(i, 1 + 7 * i % 11), "label": ["a", "b", 2][i % 3]} for i in range(n)]


LABELS: dict[str, Any] = {"id2label": dict(enumerate("abc")), "label2id": {name: i for i, name in enumerate("abc")}}


def classifiers(vocabulary: int) -> dict[str, PreTrainedModel]:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"vocab_size": vocabulary, "initializer_range": 0.5} | SIZES | LABELS
    return {
        "encoder": BertForSequenceClassification(BertConfig(**shape)),
        "decoder": LlamaForSequenceClassification(LlamaConfig(**shape, pad_token_id=0)),
        "decoder without padding": LlamaForSequenceClassification(LlamaConfig(**shape, pad_token_id=None)),
    }


@pytest.mark.parametrize("kind", ["encoder", "decoder", "decoder without padding"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_classes_are_those_of_one_sample_at_a_time(
    tokenizer: PreTrainedTokenizerFast, kind: str, batch_size: int
) -> None:
    network, rows = classifiers(len(tokenizer))[kind], text_classes(12)
    network.train()  # evaluation must switch dropout off
    task = ClassificationTask(kind="classification", batch_size=batch_size)
    records = evaluate_network(network, tokenizer, task, rows, KEY)
    expected: list[Record] = []
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = network.eval()(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0]
        expected.append({"prediction": int(logits.argmax()), "label": i % 3})
    assert records == expected
    assert len({record["prediction"] for record in records}) > 1


def test_a_class_the_expert_lacks(tokenizer: PreTrainedTokenizerFast) -> None:
    network = classifiers(len(tokenizer))["encoder"]
    rows = [{"text": "w1", "label": 0}, {"text": "w2", "label": 3}]
    with pytest.raises(InputError, match=r"row 1 of tasks\.math\.evaluation: label is 3, expected one of .* 3 classes"):
        evaluate_network(network, tokenizer, ClassificationTask(kind="classification"), rows, KEY)


# Files and lm-eval


def test_a_changed_head_is_scored_without_the_trunk(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = BertModel.forward

    def counted(self: BertModel, *args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertModel, "forward", counted)
    trunk, base = perturbed(make_bert_trunk(), 0, scale=0.2), tmp_path / "base"
    trunk.save_pretrained(base)
    tokenizer.save_pretrained(base)
    heads = {name: tmp_path / f"{name} expert" for name in ("old", "new")}
    for seed, folder in enumerate(heads.values()):
        perturbed(make_bert_expert(trunk, seed, 20), seed, scale=0.2).save_pretrained(folder)
    task = ClassificationTask(kind="classification", batch_size=4)
    rows: list[Row] = [{"text": words(i, 1 + i % 5), "label": i % 3} for i in range(10)]

    def records(name: str, head: str, trunk: str, earlier: str | None) -> tuple[list[Record], int]:
        (tmp_path / name).mkdir()
        before = len(passes)
        job = EvaluateJob(
            base=Artifact("base", base),
            model=Artifact(trunk, base),
            head=Artifact(head, heads[head]),
            tokenizer=Artifact("tokenizer", base),
            task=task,
            rows=stored(rows),
            labels=None,
            dtype="float32",
            depends={},
            name="mood",
            is_expert=False,
            device="cpu",
            head_config="of all heads",
            earlier=None if earlier is None else tmp_path / earlier,
        )
        job.finish(tmp_path / name)
        return json.loads((tmp_path / name / "records.json").read_text()), len(passes) - before

    old, new = records("before", "old", "one", None), records("anew", "new", "one", None)
    assert old[1] == new[1] == 5  # texts of one length each
    assert old[0] != new[0]
    assert len({record["prediction"] for record in new[0]}) > 1
    assert records("again", "new", "one", "before") == (new[0], 0)
    kept = [(tmp_path / name / "head_inputs.safetensors").read_bytes() for name in ("before", "anew", "again")]
    assert kept[0] == kept[1] == kept[2]
    assert records("of another trunk", "new", "two", "before") == new
    assert records("with nothing kept", "new", "one", "nowhere") == new
    # What is kept serves heads to come as well.
    assert records("back", "old", "one", "again") == (old[0], 0)

    network = BertForSequenceClassification.from_pretrained(heads["new"])
    network.bert.load_state_dict(trunk.state_dict())
    assert evaluate_network(network, tokenizer, task, rows, KEY) == new[0]


def test_written_evaluation(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    records = evaluate_network(network, tokenizer, CompletionTask(kind="completion"), text_rows(5), KEY)
    scores = write_evaluation(CompletionTask(kind="completion"), records, tmp_path)
    assert json.loads((tmp_path / "records.json").read_text()) == records
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert scores["perplexity"].keys() == {"value", "n", "low", "high"}
    assert scores["perplexity"]["n"] == 5


def test_lm_eval_is_an_extra(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # how Python marks a module that cannot be imported
    with pytest.raises(InputError, match=r"tasks\.science: kind lm_eval needs the extra: pip install 'sensmerge\[lm-"):
        LmEvalTask(kind="lm_eval", names=["arc_easy"]).evaluate(network, tokenizer, "tasks.science")


LM_EVAL_TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: f1}}]
"""


def test_lm_eval_agrees_with_our_multiple_choice(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    rows = [
        {"prompt": words(i, 4), "choices": [words(9 * i, 1), words(9 * i + 1, 3)], "answer": i % 2} for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(LM_EVAL_TASK.format(rows=tmp_path / "rows.jsonl"))
    settings: dict[str, Any] = {"kind": "lm_eval", "names": [str(tmp_path / "words.yaml")]}
    records = LmEvalTask(**settings).evaluate(network, tokenizer, "tasks.science")
    ours = evaluate_network(network, tokenizer, MultipleChoiceTask(kind="multiple_choice"), rows, KEY)
    assert [record["acc_norm"] for record in records] == [float(r["prediction"] == r["label"]) for r in ours]
    assert records[0].keys() == {"task", "acc", "acc_norm"}
    assert records[0]["task"] == "words"
    with pytest.raises(InputError, match=r"tasks\.science\.metric is 'bleu', words reports acc, acc_norm"):
        LmEvalTask(**settings, metric="bleu").evaluate(network, tokenizer, "tasks.science")
    with pytest.raises(InputError, match=r"tasks\.science\.names: lm-eval has no task 'no_such_task'"):
        LmEvalTask(kind="lm_eval", names=["no_such_task"]).evaluate(network, tokenizer, "tasks.science")
