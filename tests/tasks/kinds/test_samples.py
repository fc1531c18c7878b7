"""Rows of texts as samples: what is read, what is cut, and what the loss counts."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.answers import find_answer
from sensmerge.tasks.kinds.classification import ClassificationTask, class_index
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.multiple_choice import MultipleChoiceTask
from sensmerge.tasks.networks.tokens import collate, pad, tokens

KEY = "tasks.math.calibration"


CHOICE: dict[str, Any] = {"kind": "multiple_choice"}


def completion_task(**settings: Any) -> CompletionTask:
    return CompletionTask(kind="completion", **settings)


def bpe_tokenizer(template: str, pair: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose special tokens stand where `template` says (`<s> $A </s>`), and `pair` of two texts."""
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
        [processors.TemplateProcessing(single=template, pair=pair, special_tokens=[("<s>", 0), ("</s>", 1)])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer("<s> $A")


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


def test_a_slow_answer_is_found_in_rows_and_in_what_models_say() -> None:
    task = completion_task(answer="(a|aa)+$")
    with pytest.raises(InputError, match=r"^tasks\.math\.answer: searching a text for '\(a\|aa\)\+\$' takes too long"):
        task.check_rows([{"prompt": "x", "completion": "a" * 60 + "b"}], KEY)
    with pytest.raises(InputError, match=r"^answer: searching a text for"):
        task.answer_record({"prompt": "x", "completion": "a"}, "a" * 60 + "b")
    with pytest.raises(InputError, match=r"^tasks\.math\.answer: '\(a' is not a regular expression"):
        completion_task(answer="(a").check_rows([ROW], KEY)


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
    assert everything.tolist() == [-100, *tokenizer("seven? fifteen")["input_ids"][1:]]  # nothing predicts the first


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


def test_classification_of_a_pair_joins_texts_as_the_tokenizer_does() -> None:
    joining = bpe_tokenizer("<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1")
    row = {"text": "how many are seven", "other": "and eight", "label": "b"}
    task = ClassificationTask(kind="classification", pair="{other}?")
    sample = task.sample(row, joining, "row 0", {"a": 0, "b": 1})
    assert sample.inputs == {"input_ids": joining("how many are seven", "and eight?")["input_ids"]}
    assert (sample.label, sample.prompt, task.question(row, joining, "row 0")) == (1, sample.inputs, sample.inputs)
    cut = ClassificationTask(kind="classification", pair="{other}", max_length=7)
    ids = cut.sample(row, joining, "row 0", {"a": 0, "b": 1}).input_ids
    assert len(ids) == 7
    assert ids.count(1) == 2  # the longer text is cut, not what joins both
    with pytest.raises(InputError, match=r"tasks\.a\.pair names field 'other', row 0 of .* has 'text'"):
        task.check_rows([{"text": "", "label": 0}], "tasks.a.evaluation")


def test_single_texts_among_pairs_have_tokens_of_the_first_text_alone() -> None:
    pair, single = {"input_ids": [5, 6], "token_type_ids": [0, 1]}, {"input_ids": [7, 8, 9]}
    assert collate([pair, single], 4)["token_type_ids"].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert collate([single, pair], 4)["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 0]]
