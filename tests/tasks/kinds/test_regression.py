"""Rows of texts with numbers as samples, losses and records."""

from typing import Any

import pytest
import torch
from scipy.stats import pearsonr
from transformers import BertForSequenceClassification, BertTokenizer

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.regression import RegressionTask
from tests.conftest import bert_config

ROW: dict[str, Any] = {"text": "a b", "other": "c", "label": 2.5}


def task(**settings: Any) -> RegressionTask:
    return RegressionTask(kind="regression", **settings)


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def test_one_text(tokenizer: BertTokenizer) -> None:
    sample = task().sample(ROW, tokenizer, "row 0")
    assert (sample.inputs, sample.label) == ({"input_ids": [2, 5, 6, 3]}, 2.5)
    assert sample.prompt == sample.inputs
    assert task(max_length=3).sample(ROW, tokenizer, "row 0").input_ids == [2, 5, 3]


def test_a_pair_of_texts_is_what_the_tokenizer_makes_of_it(tokenizer: BertTokenizer) -> None:
    sample = task(pair="{other} c").sample(ROW, tokenizer, "row 0")
    encoded = tokenizer("a b", "c c")
    assert sample.inputs == {name: encoded[name] for name in ("input_ids", "token_type_ids")}
    assert sample.inputs["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert sample.prompt == sample.inputs
    cut = task(pair="{other}", max_length=5).sample(ROW | {"other": "c c c"}, tokenizer, "row 0")
    assert cut.inputs == {"input_ids": [2, 5, 3, 7, 3], "token_type_ids": [0, 0, 0, 1, 1]}
    whole = task(pair="{other}").sample(ROW | {"other": "c c c"}, tokenizer, "row 0")
    assert cut.content != whole.content


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_squared_error(tokenizer: BertTokenizer, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = BertForSequenceClassification._from_config(bert_config(1), dtype=dtype).eval()
    batch = task(pair="{other}").calibration_batch(ROW, tokenizer, "row 0")
    assert (batch["labels"].tolist(), batch["labels"].dtype) == ([2.5], torch.float32)
    output = network(**batch)
    torch.testing.assert_close(output.loss.float(), (output.logits.float()[0, 0] - 2.5) ** 2)
    output.loss.backward()


def test_records_hold_both_numbers(tokenizer: BertTokenizer) -> None:
    sample = task().sample(ROW | {"label": "-1e-3"}, tokenizer, "row 0")
    record = task().record(ROW, [task().judge(sample, torch.tensor([0.75]))])
    assert record == {"prediction": 0.75, "label": -0.001}
    assert task().is_right(record) is None
    scores = task().scores([record, {"prediction": 1.75, "label": 3}, {"prediction": 9.0, "label": 2}])
    expected = pearsonr([0.75, 1.75, 9.0], [-0.001, 3, 2]).statistic
    assert {name: one.value for name, one in scores.items()} == pytest.approx(
        {"pearson": expected, "spearman": 0.5, "mse": (0.751**2 + 1.25**2 + 49) / 3}
    )
    assert [task().lower_is_better(name) for name in scores] == [False, False, True]
    with pytest.raises(InputError, match="NaN or infinite logits"):
        task().judge(sample, torch.tensor([torch.inf]))


@pytest.mark.parametrize("label", ["four", "", "nan", "inf", float("nan"), float("-inf"), True, [1.0], "1" + "0" * 400])
def test_labels_that_are_no_numbers(label: Any) -> None:
    message = r"tasks.sts.label names field 'label', which in row 3 is .*; expected a finite number"
    with pytest.raises(InputError, match=message) as raised:
        task().check_rows([ROW | {"label": label}], "tasks.sts.evaluation", {"LABEL_0": 0}, ["row 3"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("label", [3, 3.5, "3.5", "-2e3", 0])
def test_labels_that_are_numbers(label: Any) -> None:
    task().check_rows([ROW | {"label": label}], "tasks.sts.evaluation")


def test_fields_of_the_second_text_are_checked() -> None:
    with pytest.raises(InputError, match=r"tasks.sts.pair names field 'sentence2', row 0 of .* has 'text'"):
        task(pair="{sentence2}").check_rows([ROW], "tasks.sts.evaluation")
    with pytest.raises(InputError, match=r"tasks.sts.pair: template '\{x': .*double a literal brace"):
        task(pair="{x").check_rows([ROW], "tasks.sts.evaluation")


def test_numbers_and_classes_are_told_apart_by_the_expert_s_config() -> None:
    number, classes = bert_config(1), bert_config(3)
    task().check_config(number, "tasks.sts")
    with pytest.raises(InputError, match=r"tasks.sts.kind: regression, but the expert's config has num_labels 3"):
        task().check_config(classes, "tasks.sts")
    classification = ClassificationTask(kind="classification")
    classification.check_config(classes, "tasks.mood")
    with pytest.raises(InputError, match=r"tasks.mood.kind: classification, .* num_labels 1 .* use kind regression"):
        classification.check_config(number, "tasks.mood")
    number.problem_type = classes.problem_type = "multi_label_classification"
    for one, config in ((task(), number), (classification, classes)):
        with pytest.raises(InputError, match="problem_type multi_label_classification"):
            one.check_config(config, "tasks.x")
