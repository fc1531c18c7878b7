import subprocess
import sys
from datetime import date
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask, class_index
from sensmerge.tasks.kinds.completion import CompletionTask, find_answer
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.kinds.templates import render, template_fields
from sensmerge.tasks.networks.tokens import pad, tokens
from sensmerge.tasks.rows.source import rows_digest

KEY = "tasks.math.calibration"


def bpe_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose special tokens stand where `template` says, as in '<s> $A </s>'."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Question: how many are seven and eight? Answer: fifteen"] * 3, trainer)
    tokenizer.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer("<s> $A")


def test_digest_is_of_content_and_order() -> None:
    rows = [{"a": 1, "b": "é"}, {"a": 2, "b": "x"}]
    assert rows_digest(rows) == rows_digest([{"b": "é", "a": 1}, {"b": "x", "a": 2}])
    assert len({rows_digest(rows), rows_digest(rows[::-1]), rows_digest(rows[:1]), rows_digest([])}) == 4


def test_schemas_are_read_without_torch() -> None:
    code = (
        "import sys; from sensmerge.tasks.kinds.kind import KINDS; assert len(KINDS) >= 4; "
        "print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# Templates


def test_templates() -> None:
    assert template_fields("Q: {question} {{x}} {a-b}{question}") == ["question", "a-b", "question"]
    assert render("{{{a}}} {b}", {"a": 1, "b": "{a}"}) == "{1} {a}"


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a:{b}}", "{a.__class__}"])
def test_templates_reach_no_further_than_the_row(template: str) -> None:
    with pytest.raises(InputError, match="template"):
        render(template, {"a": "x", "b": "y", "": "z"})


@given(st.dictionaries(st.text("abc_ -", min_size=1), st.text(), min_size=1))
def test_render_is_str_format(row: dict[str, str]) -> None:
    template = "{{" + "".join(f"<{{{name}}}" for name in row) + "}}"
    assert render(template, row) == template.format(**row)


# Checks

COMPLETION: dict[str, Any] = {"kind": "completion"}
CHOICE: dict[str, Any] = {"kind": "multiple_choice"}


def completion_task(**settings: Any) -> CompletionTask:
    return CompletionTask(**COMPLETION | settings)


def test_good_rows_pass() -> None:
    completion_task(answer=r"#### (\d+)").check_rows([{"prompt": "", "completion": "so #### 12"}], KEY)
    classification = ClassificationTask(kind="classification")
    classification.check_rows([{"text": "a", "label": 1}, {"text": "b", "label": "no"}], KEY, {"yes": 0, "no": 1})
    classification.check_rows([{"text": "a", "label": 99}], KEY)
    MultipleChoiceTask(**CHOICE).check_rows([{"prompt": "p", "choices": ["a", "b"], "answer": 1}], KEY)


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        (
            COMPLETION | {"prompt": "Q: {question}"},
            {"prompt": "p", "completion": "c"},
            "tasks.math.prompt names field 'question', row 0 of tasks.math.calibration has 'prompt', 'completion'",
        ),
        (
            COMPLETION,
            {"prompt": "p", "completion": None},
            "tasks.math.completion names field 'completion', which is null in row 0 of tasks.math.calibration",
        ),
        (COMPLETION, {"prompt": True, "completion": "c"}, "field 'prompt', which is true in row 0 .*expected a text"),
        (COMPLETION, {"prompt": "p", "completion": ["a"]}, "field 'completion', which is a list in row 0"),
        (COMPLETION, {"prompt": [{"role": "user"}], "completion": "c"}, "field 'prompt', which is a list in row 0"),
        (COMPLETION, {"prompt": {"a": 1}, "completion": "c"}, "field 'prompt', which is an object in row 0"),
        (COMPLETION, {"prompt": 0.5, "completion": "c"}, "field 'prompt', which is the number 0.5 without a text"),
        (
            COMPLETION,
            {"prompt": date(2024, 1, 15), "completion": "c"},
            "field 'prompt', which is a date .2024-01-15. in row 0",
        ),
        (COMPLETION | {"prompt": "{prompt.x}"}, {"prompt": "p"}, "tasks.math.prompt: template"),
        (COMPLETION | {"metric": "exact_match"}, {}, "tasks.math.metric is exact_match, set tasks.math.generate"),
        (COMPLETION | {"answer": "("}, {"prompt": "p", "completion": "c"}, "tasks.math.answer: .* regular expression"),
        (COMPLETION | {"answer": "#"}, {"prompt": "p", "completion": "c"}, "tasks.math.answer: '#' matches nothing"),
        ({"kind": "classification"}, {"text": "t"}, "tasks.math.label names field 'label'"),
        (
            {"kind": "classification"},
            {"text": "t", "label": 2},
            "label is 2, expected one of .* 2 classes: 0 no, 1 yes",
        ),
        ({"kind": "classification"}, {"text": "t", "label": -1}, "row 0 of tasks.math.calibration: label is -1"),
        ({"kind": "classification"}, {"text": "t", "label": "maybe"}, "label is 'maybe'"),
        ({"kind": "classification"}, {"text": "t", "label": 0.5}, "label is 0.5"),
        ({"kind": "classification"}, {"text": "t", "label": True}, "label is True"),
        ({"kind": "classification"}, {"text": "t", "label": "01"}, "label is '01'"),
        ({"kind": "classification"}, {"text": "t", "label": "2"}, "label is '2'"),
        ({"kind": "classification"}, {"text": "t", "label": None}, "names field 'label', which is null in row 0"),
        (CHOICE, {"prompt": "p", "choices": ["a"]}, "tasks.math.answer names field 'answer'"),
        (CHOICE, {"prompt": "p", "choices": [], "answer": 0}, r"choices are \[\]"),
        (CHOICE, {"prompt": "p", "choices": ["a", ""], "answer": 0}, "expected a list of texts that are not empty"),
        (CHOICE, {"prompt": "p", "choices": "ab", "answer": 0}, "choices are 'ab'"),
        (CHOICE, {"prompt": "p", "choices": ["a", True], "answer": 0}, r"choices are \['a', True\]"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": True}, "answer is True"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": "2"}, "answer is '2', .* 0 to 1"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": 2}, "answer is 2, .* 0 to 1"),
        (CHOICE, {"prompt": "p", "choices": ["a", "b"], "answer": "A"}, "answer is 'A'"),
        (CHOICE | {"completion": " x"}, {}, "tasks.math.completion is ' x', expected a template that names {choice}"),
    ],
)
def test_bad_rows(settings: dict[str, Any], row: dict[str, Any], message: str) -> None:
    kinds = {"completion": CompletionTask, "classification": ClassificationTask, "multiple_choice": MultipleChoiceTask}
    with pytest.raises(InputError, match=message):
        kinds[settings["kind"]](**settings).check_rows([row], KEY, {"no": 0, "yes": 1})


def test_the_bad_row_is_named() -> None:
    rows = [{"prompt": "p", "completion": "c"}] * 4 + [{"prompt": "p"}]
    with pytest.raises(InputError, match="row 4 of"):
        completion_task().check_rows(rows, KEY)


def test_a_bad_row_is_named_by_its_place() -> None:
    rows, places = [{"prompt": "p", "completion": "c"}, {"prompt": "p"}], ["line 1 of a.csv", "line 7 of a.csv"]
    with pytest.raises(
        InputError, match=r"tasks\.math\.completion names field 'completion', line 7 of a\.csv has 'prompt'"
    ):
        completion_task().check_rows(rows, KEY, places=places)


def test_numbers_of_classes_and_choices_may_be_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [class_index(label, {"no": 0, "yes": 1}, "") for label in (1, "1", "yes")] == [1, 1, 1]
    # A class that is called by a number is found by its name first.
    assert [class_index(label, {"1": 0, "0": 1}, "") for label in ("1", "0", 1, 0)] == [0, 1, 1, 0]
    task, row = MultipleChoiceTask(**CHOICE), {"prompt": "seven", "choices": ["1.50", 2], "answer": "1"}
    task.check_rows([row], KEY)
    assert task.sample(row, tokenizer, "row 0") == task.sample(row | {"answer": 1}, tokenizer, "row 0")
    whole = MultipleChoiceTask(**CHOICE, loss_on="all").calibration_batch(row, tokenizer, "row 0")["input_ids"]
    assert whole[0].tolist() == tokenizer("seven 2")["input_ids"]


def test_find_answer() -> None:
    assert find_answer(r"#### (\d+)", "#### 1 then #### 23 ") == "23"
    assert find_answer(r"\d+ *", "1 and 45  ") == "45"
    assert find_answer(r"\d", "none") is None


# Tokens

ROW = {"prompt": "how many are seven", "completion": "fifteen"}


def test_completion_is_tokenised_apart_with_begin_and_end_once(tokenizer: PreTrainedTokenizerFast) -> None:
    task = completion_task(prompt="Question: {prompt}\nAnswer:", completion=" {completion}")
    sample = task.sample(ROW, tokenizer, "row 0")
    prompt, completion = sample.input_ids[: sample.prompt_tokens], sample.input_ids[sample.prompt_tokens :]
    assert prompt == tokenizer("Question: how many are seven\nAnswer:")["input_ids"]
    assert completion == tokenizer(" fifteen", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1
    bare = completion_task(end_token=False).sample(ROW, tokenizer, "row 0")
    assert bare.input_ids[-1] != tokenizer.eos_token_id


def test_a_tokenizer_that_closes_every_text(tokenizer: PreTrainedTokenizerFast) -> None:
    closing = bpe_tokenizer("<s> $A </s>")
    assert closing("a")["input_ids"][-1] == closing.eos_token_id
    for task in (completion_task(), completion_task(loss_on="all", end_token=False)):
        assert task.sample(ROW, closing, "row 0") == task.sample(ROW, tokenizer, "row 0")
        batches = [task.calibration_batch(ROW, each, "row 0")["input_ids"] for each in (closing, tokenizer)]
        assert torch.equal(*batches)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A"])
def test_begin_and_end_that_a_text_has_itself_stand_there_once(template: str) -> None:
    """As after a chat template, whose text is tokenised without further special tokens."""
    tokenizer = bpe_tokenizer(template)
    row = {"prompt": "<s>how many", "completion": " fifteen</s>"}
    whole = tokenizer("<s>how many fifteen</s>", add_special_tokens=False)["input_ids"]
    assert completion_task().sample(row, tokenizer, "row 0").input_ids == whole
    batch = completion_task(loss_on="all").calibration_batch(row, tokenizer, "row 0")
    assert batch["input_ids"][0].tolist() == whole
    choice = {"prompt": "<s>how many", "choices": ["fifteen"], "answer": 0}
    assert MultipleChoiceTask(**CHOICE).sample(choice, tokenizer, "row 0").input_ids == whole[:-1]
    # Two that the text has itself are its own.
    assert tokens("<s><s>a", tokenizer, front=True)[:2] == [0, 0] != tokens("<s><s>a", tokenizer, front=True)[1:3]
    assert tokens("a</s></s>", tokenizer, front=True)[-3:] == [
        *tokenizer("a", add_special_tokens=False).input_ids,
        1,
        1,
    ]


@pytest.mark.parametrize("name", ["bos_token", "cls_token"])
def test_a_text_to_classify_begins_once(name: str) -> None:
    both = bpe_tokenizer("<s> $A </s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=both.backend_tokenizer, eos_token="</s>", **{name: "<s>"})
    task = ClassificationTask(kind="classification")
    for max_length in (512, 5):
        settings = {"max_length": max_length}
        plain, own = (
            task.model_copy(update=settings).sample({"text": text, "label": 0}, tokenizer, "row 0", {"a": 0})
            for text in ("how many are seven", "<s>how many are seven")
        )
        assert plain == own
        assert len(own.input_ids) <= max_length


def test_a_long_prompt_loses_its_beginning_then_the_completion_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a b c d e f g h", "completion": "x y z"}
    whole = completion_task().sample(row, tokenizer, "row 0")
    prompt, completion = whole.input_ids[: whole.prompt_tokens], whole.input_ids[whole.prompt_tokens :]
    assert len(prompt) > len(completion) > 2
    shorter = completion_task(max_length=len(whole.input_ids) - 1).sample(row, tokenizer, "row 0")
    assert (shorter.input_ids, shorter.prompt_tokens) == (prompt[1:] + completion, len(prompt) - 1)
    tight = completion_task(max_length=4).sample(row, tokenizer, "row 0")
    assert (tight.input_ids, tight.prompt_tokens) == (prompt[-2:] + completion[:2], 2)


def test_a_completion_without_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="row 7: the completion has no token to score"):
        completion_task(end_token=False).sample({"prompt": "a", "completion": ""}, tokenizer, "row 7")


def test_no_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="end_token: false"):
        completion_task().sample(ROW, plain, "row 0")
    # Without begin token and prompt, the first token has nothing to be predicted from.
    empty = completion_task(end_token=False).sample({"prompt": "", "completion": "a"}, bpe_tokenizer("$A <s>"), "row")
    assert (empty.prompt_tokens, empty.scored_from) == (1, 1)


def test_classification_keeps_special_tokens_when_cut() -> None:
    closing = bpe_tokenizer("<s> $A </s>")
    task = ClassificationTask(kind="classification", max_length=5)
    sample = task.sample({"text": "how many are seven and eight", "label": "b"}, closing, "row 0", {"a": 0, "b": 1})
    assert len(sample.input_ids) == 5
    assert (sample.input_ids[0], sample.input_ids[-1], sample.label) == (0, 1, 1)


def test_choices_are_whole_and_the_prompt_is_cut_from_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "how many are seven and eight?", "choices": ["fifteen", "x"], "answer": 1}
    whole = MultipleChoiceTask(**CHOICE).samples(row, tokenizer, "row 0")
    longest = max(len(sample.input_ids) for sample in whole)
    cut = MultipleChoiceTask(**CHOICE, max_length=longest - 1).samples(row, tokenizer, "row 0")
    for before, after in zip(whole, cut, strict=True):
        assert after.input_ids == before.input_ids[-(longest - 1) :]
        assert after.input_ids[after.prompt_tokens :] == before.input_ids[before.prompt_tokens :]
    assert MultipleChoiceTask(**CHOICE).sample(row, tokenizer, "row 0") == whole[1]
    with pytest.raises(InputError, match="row 0: choice 'x y' needs"):
        MultipleChoiceTask(**CHOICE, max_length=2).samples(row | {"choices": ["x y"]}, tokenizer, "row 0")


@pytest.fixture(scope="module")
def network(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).double().eval()


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_calibration_loss_is_the_mean_over_the_counted_tokens(
    network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_on: str
) -> None:
    task = completion_task(loss_on=loss_on, completion=" {completion}")
    batch = task.calibration_batch(ROW, tokenizer, "row 0")
    ids = batch["input_ids"][0].tolist()
    start = len(tokenizer(ROW["prompt"])["input_ids"]) if loss_on == "completion" else 1
    log_p = network(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -torch.stack([log_p[t - 1, ids[t]] for t in range(start, len(ids))]).mean()
    torch.testing.assert_close(network(**batch).loss.double(), expected)


def test_loss_on_all_reads_the_text_as_one(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "how ma", "completion": "ny are"}
    apart = completion_task(end_token=False).sample(row, tokenizer, "row 0").input_ids
    whole = completion_task(end_token=False, loss_on="all").calibration_batch(row, tokenizer, "row 0")["input_ids"]
    assert whole[0].tolist() == tokenizer("how many are")["input_ids"] != apart
    empty = {"prompt": "", "completion": ""}
    with pytest.raises(InputError, match="row 0: a text of 1 tokens"):
        completion_task(end_token=False, loss_on="all").calibration_batch(empty, tokenizer, "row 0")


def test_calibration_of_a_choice_is_the_right_one(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "seven?", "choices": ["x", "fifteen"], "answer": 1}
    labels = MultipleChoiceTask(**CHOICE).calibration_batch(row, tokenizer, "row 0")["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == " fifteen"
    everything = MultipleChoiceTask(**CHOICE, loss_on="all").calibration_batch(row, tokenizer, "row 0")["labels"][0]
    assert everything.tolist() == tokenizer("seven? fifteen")["input_ids"]


def test_calibration_of_a_class(tokenizer: PreTrainedTokenizerFast) -> None:
    task = ClassificationTask(kind="classification")
    batch = task.calibration_batch({"text": "seven", "label": "b"}, tokenizer, "row 0", {"a": 0, "b": 1})
    assert batch["labels"].tolist() == [1]
    assert batch["input_ids"].tolist() == [tokenizer("seven")["input_ids"]]
    assert batch["attention_mask"].shape == batch["input_ids"].shape


def test_padding() -> None:
    right, left = pad([[1, 2, 3], [4]], 9), pad([[1, 2, 3], [4]], 9, side="left")
    assert right["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_half_a_character_is_refused_by_its_row() -> None:
    with pytest.raises(InputError, match=r"field .prompt., which has half a surrogate pair in row 0 of .*; repair"):
        completion_task().check_rows([{"prompt": "a \ud800", "completion": "b"}], KEY)
