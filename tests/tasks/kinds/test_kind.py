"""The contract: kinds that nothing but their own class knows of, and what of a task counts for what."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import yaml
from pydantic import Field
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.tasks.artifacts import Artifact, read_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Local, identity
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask
from sensmerge.tasks.kinds.lm_eval import LmEvalTask
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, agreement, mean
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.networks.tokens import collate, tokens
from sensmerge.tasks.rows.source import DataSource, Row
from sensmerge.tasks.stages.evaluate import evaluate_network
from sensmerge.tasks.stages.evaluate_dynamic import EvaluateDynamicJob
from tests.conftest import known, make_llama, make_tokenizer, plan_of, row_set, write_rows
from tests.tasks.dynamic import test_model as models
from tests.tasks.dynamic.test_model import Merge
from tests.tasks.stages.test_merge_vectors import vectors_of

llama_experts, causal = models.llama_experts, models.causal


@dataclass(frozen=True)
class WordSample(Sample):
    words: tuple[int, ...] = ()
    """the first token of each word"""


class WordChoiceTask(RowTask):
    """The model says which of a few words comes next."""

    fields: ClassVar[tuple[str, ...]] = ("answer",)
    metrics: ClassVar[Mapping[str, Metric]] = {
        "word_accuracy": Metric(("prediction", "label"), agreement, is_proportion=True),
        "surprise": Metric(("surprise",), mean, higher_is_better=False),
    }

    kind: Literal["word_choice"]
    prompt: str = Field("{prompt}", description="template of the text before the word")
    words: list[str] = Field(description="the words; the first token of each counts")
    answer: str = Field("answer", description="field with the right word")
    metric: Local[str] = Field("word_accuracy", description="main metric")

    def check_row(self, row: Row, settings: str, where: str, labels: Labels | None) -> None:
        if row[self.answer] not in self.words:
            raise InputError(f"{where}: answer is {row[self.answer]!r}, expected one of {', '.join(self.words)}")

    def sample(self, row: Row, tokenizer: Any, where: str, labels: Labels | None = None) -> Sample:
        prompt = tokens(render(self.prompt, row), tokenizer, front=True)
        words = tuple(tokens(word, tokenizer, front=False)[0] for word in self.words)
        label = self.words.index(row[self.answer])
        return WordSample({"input_ids": [*prompt, words[label]]}, len(prompt), words=words)

    def judge(self, sample: Sample, logits: torch.Tensor) -> Any:
        assert isinstance(sample, WordSample)
        log_p = logits[sample.prompt_tokens - 1].double().log_softmax(-1)[list(sample.words)]
        label = sample.words.index(sample.input_ids[-1])
        return {"prediction": int(log_p.argmax()), "label": label, "surprise": -float(log_p[label])}


class ImageClassesTask(ClassificationTask):
    """A classifier of images, to which no text is."""

    kind: Literal["image_classes"]  # type: ignore[assignment]
    templates: ClassVar[tuple[str, ...]] = ()

    def sample(self, row: Row, tokenizer: Any, where: str, labels: Any = None) -> Sample:
        return Sample({"pixel_values": torch.tensor(row["pixels"]).view(1, 8, 8)}, label=row[self.label])


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The kinds of this module, for as long as a test runs."""
    with known(KINDS, word_choice=WordChoiceTask, image_classes=ImageClassesTask):
        yield


WORDS = ["yes", "no", "3"]
ROWS: list[Row] = [{"prompt": f"{i}+{i}=", "answer": WORDS[i % 3]} for i in range(6)]


def word_choice(**settings: Any) -> WordChoiceTask:
    return WordChoiceTask.model_validate({"kind": "word_choice", "words": WORDS, **settings})


def test_a_recipe_knows_what_is_registered(llama_recipe: dict[str, Any], tmp_path: Path) -> None:
    schema = Recipe.model_json_schema()
    assert schema["$defs"]["WordChoiceTask"]["properties"]["words"]["description"].startswith("the words")
    assert "word_choice" in json.dumps(schema["properties"]["tasks"])
    path = tmp_path / "recipe.yaml"
    for changes, message in (
        ({"kind": "word_choise", "words": WORDS}, r"tasks\.math: .*'word_choise'.*'completion'.*'word_choice'"),
        ({"words": WORDS}, r"tasks\.math: .*'kind'"),
        ({"kind": "word_choice"}, r"tasks\.math\.words is missing"),
        ({"kind": "word_choice", "words": WORDS, "answr": "x"}, r"unknown key tasks\.math\.answr"),
        ({"kind": "word_choice", "words": WORDS, "max_length": 1}, r"tasks\.math\.max_length: .*found 1"),
        ("completion", r"tasks\.math: .*dictionary"),
    ):
        path.write_text(yaml.safe_dump({**llama_recipe, "tasks": {"math": changes}}))
        with pytest.raises(InputError, match=message):
            load_recipe(path)


def test_a_kind_of_a_test_is_planned_calibrated_and_evaluated(
    llama_recipe: dict[str, Any], llamas: dict[str, Path], tmp_path: Path
) -> None:
    write_rows(tmp_path / "words.jsonl", ROWS)
    source = {"path": "json", "data_files": "words.jsonl", "samples": 3}
    llama_recipe["tasks"]["math"] = {
        "kind": "word_choice",
        "words": WORDS,
        "calibration": source,
        "evaluation": source,
    }
    plan = plan_of(tmp_path, llama_recipe)
    plan.write_rows()
    calibration, evaluation = plan.inputs.data["math"].calibration, plan.inputs.data["math"].evaluation
    assert len(calibration) == len(evaluation) == 3
    assert not {row["prompt"] for row in calibration} & {row["prompt"] for row in evaluation}

    (tmp_path / "statistics").mkdir()
    found = plan.step("statistics", "math").job.finish(tmp_path / "statistics")
    assert (found["samples"], found["tokens"]) == (3, sum(len(row["prompt"]) + 1 for row in calibration))

    (tmp_path / "scores").mkdir()
    scores = plan.step("evaluate", "math/math").job.finish(tmp_path / "scores")
    assert scores.keys() == {"word_accuracy", "surprise"}
    tokenizer, network = make_tokenizer(), AutoModelForCausalLM.from_pretrained(llamas["math"])
    for row, record in zip(evaluation, read_json(tmp_path / "scores" / "records.json"), strict=True):
        with torch.no_grad():
            logits = network(torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits[0, -1]
        log_p = logits.double().log_softmax(-1)
        expected = torch.stack([log_p[tokenizer(word)["input_ids"][0]] for word in WORDS])
        label = WORDS.index(row["answer"])
        assert (record["prediction"], record["label"]) == (int(expected.argmax()), label)
        assert record["surprise"] == pytest.approx(-float(expected[label]), rel=1e-5)

    write_rows(tmp_path / "words.jsonl", [*ROWS[:-1], {"prompt": "?", "answer": "perhaps"}])
    with pytest.raises(InputError, match=r"line 6 of .*words\.jsonl: answer is 'perhaps', expected one of yes, no, 3"):
        plan_of(tmp_path, llama_recipe)


def test_dynamic_models_answer_it_too(causal: Merge, tmp_path: Path) -> None:
    calibration = {name: row_set(word_choice(), ROWS[i : i + 3]) for i, name in enumerate(causal.calibration)}
    model = replace(causal, calibration=calibration).routed(tmp_path / "model", temperature=1e9)
    evaluation = {"math": row_set(word_choice(batch_size=2), ROWS)}
    (tmp_path / "out").mkdir()
    EvaluateDynamicJob(Artifact("", tmp_path / "model"), evaluation, {}, "cpu").finish(tmp_path / "out")
    # At a high temperature all samples have the static merge's coefficients.
    network = make_llama()
    samples = models.tokenised(model, ["1"])
    coefficients = models.by_name(model, model.route(samples), 0)
    models.set_weights(network, causal.job.base.folder, vectors_of(causal.folder), coefficients)
    expected = evaluate_network(network, model.tokenizer, word_choice(), ROWS, "")
    for one, other in zip(read_json(tmp_path / "out" / "records.json")["math"], expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_sample_need_not_be_a_text() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = ViTForImageClassification(ViTConfig(**shape, **sizes, initializer_range=0.5)).eval()
    rows: list[Row] = [{"pixels": torch.randn(64).tolist(), "label": i % 3} for i in range(5)]
    task = ImageClassesTask.model_validate({"kind": "image_classes", "batch_size": 2})
    task.check_rows(rows, "tasks.digits.calibration", {"a": 0, "b": 1, "c": 2})
    images = torch.tensor([row["pixels"] for row in rows]).view(5, 1, 8, 8)
    with torch.no_grad():
        classes = network(pixel_values=images).logits.argmax(-1).tolist()
    records = evaluate_network(network, make_tokenizer(), task, rows, "tasks.digits.evaluation")
    assert records == [{"prediction": classes[i], "label": i % 3} for i in range(5)]
    batch = task.calibration_batch(rows[1], make_tokenizer(), "row 1", {"a": 0, "b": 1, "c": 2})
    assert batch["pixel_values"].shape == (1, 1, 8, 8)
    loss = torch.nn.functional.cross_entropy(network(pixel_values=images[1:2]).logits, torch.tensor([1]))
    torch.testing.assert_close(network(**batch).loss, loss)
    samples = [task.sample(row, None, "", None) for row in rows]
    assert len({sample.content for sample in [*samples, *samples]}) == 5
    assert all(sample.has_prompt and sample.prompt == sample.inputs for sample in samples)


def test_collating() -> None:
    samples = [{"input_ids": [5, 6], "pixels": torch.ones(2)}, {"input_ids": [7], "pixels": torch.zeros(2)}]
    found = collate(samples, 9)
    assert found["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert found["pixels"].tolist() == [[1, 1], [0, 0]]
    types = [{"input_ids": ids, "token_type_ids": [1] * len(ids)} for ids in ([5, 6], [7])]
    assert collate(types, 9, side="left")["token_type_ids"].tolist() == [[1, 1], [0, 1]]


SOURCES = {"calibration": DataSource(path="a"), "evaluation": DataSource(path="b"), "batch_size": 3}
TEXTS, PAIRS = {"prompt", "label"}, {"prompt", "pair", "label"}


@pytest.mark.parametrize(
    ("task", "calibration", "evaluation"),
    [
        (
            CompletionTask(kind="completion", generate=4, answer=".", metric="exact_match", **SOURCES),
            {"prompt", "completion", "end_token", "loss_on"},
            {"prompt", "completion", "end_token", "generate", "answer", "compare"},
        ),
        (ClassificationTask(kind="classification", **SOURCES), TEXTS, TEXTS),
        (ClassificationTask(kind="classification", pair="{other}", **SOURCES), PAIRS, PAIRS),
        (
            MultipleChoiceTask(kind="multiple_choice", **SOURCES),
            {"prompt", "completion", "choices", "answer", "loss_on"},
            {"prompt", "completion", "choices", "answer"},
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_of_a_task_changes_its_samples_and_what_its_scores(
    task: RowTask, calibration: set[str], evaluation: set[str]
) -> None:
    for use, keys in (("calibration", calibration), ("evaluation", evaluation)):
        expected = {key: getattr(task, key) for key in keys | {"kind", "max_length"}}
        assert identity(task, use) == expected


def test_the_main_metric_of_lm_eval_has_to_be_one_that_it_reports() -> None:
    task = LmEvalTask(kind="lm_eval", names=["a"], batch_size=3)
    expected = {
        **{"kind": "lm_eval", "names": ["a"], "limit": None, "metric": "acc", "num_fewshot": None},
        **{"apply_chat_template": False, "fewshot_as_multiturn": True, "system_instruction": None},
    }
    assert identity(task, "evaluation") == expected


def test_metrics_say_which_way_is_better() -> None:
    assert not WordChoiceTask.lower_is_better("word_accuracy")
    assert WordChoiceTask.lower_is_better("surprise")


def test_schemas_are_read_without_torch() -> None:
    code = (
        "import sys; from sensmerge.tasks.kinds.kind import KINDS; assert len(KINDS) >= 4; "
        "print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
