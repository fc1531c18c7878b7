"""Rows of words with tags as samples and records, against transformers' own alignment of words and tokens."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForTokenClassification, PreTrainedTokenizerFast

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.scores import Record
from sensmerge.tasks.kinds.token_classification import TaggedSample, TokenClassificationTask
from sensmerge.tasks.networks.tokens import check_words, word_tokens
from tests.conftest import bert_config, make_tokenizer

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LABELS = {name: number for number, name in enumerate(NAMES)}
ROW: dict[str, Any] = {"tokens": ["Ann", "Lee", "of", "Rome"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]}


def task(**settings: Any) -> TokenClassificationTask:
    return TokenClassificationTask(kind="token_classification", **settings)


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with special tokens around every text."""
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "An", "##n", "Lee", "of", "Ro", "##m", "##e"]
    model = Tokenizer(models.WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=model, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def test_the_first_token_of_a_word_has_its_tag(pieces: PreTrainedTokenizerFast) -> None:
    sample = task().sample(ROW, pieces, "row 0", LABELS)
    assert isinstance(sample, TaggedSample)
    #                          [CLS] An ##n Lee of Ro ##m ##e [SEP]
    assert sample.input_ids == [1, 4, 5, 6, 7, 8, 9, 10, 2]
    assert sample.label == (-100, 1, -100, 2, 0, 3, -100, -100, -100)
    assert sample.names == tuple(NAMES)
    numbers = ROW | {"tags": [1, "2", 0, 3]}
    assert task().sample(numbers, pieces, "row 0", LABELS) == sample


def test_words_without_a_token_do_not_count(pieces: PreTrainedTokenizerFast) -> None:
    row = {"tokens": ["Ann", " ", "Lee", "of"], "tags": ["B-PER", "I-PER", "I-PER", "O"]}
    sample = task().sample(row, pieces, "row 0", LABELS)
    assert sample.label == (-100, 1, -100, 2, 0, -100)
    cut = task(max_length=5).sample(ROW, pieces, "row 0", LABELS)
    assert (cut.input_ids, cut.label) == ([1, 4, 5, 6, 2], (-100, 1, -100, 2, -100))
    with pytest.raises(InputError, match=r"row 7: no word of field 'tokens' has a token; leave the row out"):
        task().sample({"tokens": [" "], "tags": ["O"]}, pieces, "row 7", LABELS)


def test_the_loss_is_that_of_transformers(pieces: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    network = BertForTokenClassification(bert_config(len(NAMES))).eval()
    batch = task().calibration_batch(ROW, pieces, "row 0", LABELS)
    assert batch["labels"].shape == batch["input_ids"].shape
    found = network(**batch)
    places = torch.tensor([1, 3, 4, 5])
    expected = -found.logits[0, places].log_softmax(-1)[torch.arange(4), torch.tensor([1, 2, 0, 3])].mean()
    torch.testing.assert_close(found.loss, expected)


def judged(tags: list[int], pieces: PreTrainedTokenizerFast, names: list[str] = NAMES) -> Record:
    """The record of a model that gives some tags to the words of `ROW`, and the last class to all other tokens."""
    labels = {name: number for number, name in enumerate(names)}
    sample = task().sample(ROW | {"tags": [1, 2, 0, 3]}, pieces, "row 0", labels)
    logits = torch.zeros(len(sample.input_ids) + 3, len(names))  # padded on the right
    logits[:, -1] = 1.0
    for place, tag in zip([1, 3, 4, 5], tags, strict=True):
        logits[place, tag] = 2.0
    record: Record = task().record(ROW, [task().judge(sample, logits)])
    return record


def test_records_count_tags_and_entities(pieces: PreTrainedTokenizerFast) -> None:
    right = judged([1, 2, 0, 3], pieces)
    assert right == {"right": 4, "tags": 4, "exact_match": 1, "found": 2, "predicted": 2, "expected": 2}
    # Lee is a person of her own, so Ann Lee is not found.
    wrong = judged([1, 1, 0, 3], pieces)
    assert wrong == {"right": 3, "tags": 4, "exact_match": 0, "found": 1, "predicted": 3, "expected": 2}
    assert [task().is_right(one) for one in (right, wrong)] == [True, False]
    scores = task().scores([right, wrong, wrong])
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {"f1": 8 / 14, "precision": 4 / 8, "recall": 4 / 6, "accuracy": 10 / 12, "exact_match": 1 / 3}
    )
    assert scores["f1"].low == pytest.approx(0.4)  # every text the wrong one
    assert scores["f1"].high == pytest.approx(1.0)


def test_classes_that_are_no_tags_of_entities_have_an_accuracy_alone(pieces: PreTrainedTokenizerFast) -> None:
    record = judged([1, 2, 0, 0], pieces, ["ADP", "ADJ", "NOUN", "VERB"])
    assert record == {"right": 3, "tags": 4, "exact_match": 0}
    assert task().scores([record]).keys() == {"accuracy", "exact_match"}


def test_logits_that_are_not_finite(pieces: PreTrainedTokenizerFast) -> None:
    sample = task().sample(ROW, pieces, "row 0", LABELS)
    with pytest.raises(InputError, match="NaN or infinite logits"):
        task().judge(sample, torch.full((9, 5), torch.nan))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tasks.ner.tokens names field 'tokens', which is null in row 3"),
        ({"tokens": "Ann Lee"}, "names field 'tokens', which in row 3 is 'Ann Lee'; expected a list of words"),
        ({"tokens": []}, r"which in row 3 is \[\]; expected a list of words"),
        ({"tokens": [1, 2, 3, 4]}, "expected a list of words"),
        ({"tokens": ["\ud800", "a", "b", "c"]}, "half a surrogate pair in row 3"),
        (
            {"tags": ["O"]},
            "which in row 3 is a list of 1; expected a list of a tag for each of the 4 words",
        ),
        ({"tags": "OOOO"}, "which in row 3 is 'OOOO'; expected a list of a tag"),
        (
            {"tags": ["O", "O", "B-ORG", "O"]},
            r"row 3: tags\[2\]: label is 'B-ORG', expected one of the expert's 5",
        ),
        ({"tags": [0, 0, 0, 5]}, r"row 3: tags\[3\]: label is 5, expected one of"),
        ({"tags": [0, True, 0, 0]}, r"row 3: tags\[1\]: label is True"),
    ],
)
def test_rows_that_cannot_be_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        task().check_rows([ROW | change], "tasks.ner.calibration", LABELS, ["row 3"])
    assert "\n" not in str(raised.value)


def test_numbers_become_the_names_of_the_experts_own_config() -> None:
    own = {0: "B-PER", 1: "O"}
    assert task().named({"tags": [0, "1", "O", "X", 9]}, own) == {"tags": ["B-PER", "O", "O", "X", 9]}
    assert task().named({"tags": "O"}, own) == {"tags": "O"}


def test_entities_need_names_of_classes() -> None:
    config = bert_config(2)
    with pytest.raises(InputError, match=r"tasks\.ner\.metric is f1.* are LABEL_0, LABEL_1; expected O, B-TYPE"):
        task().check_config(config, "tasks.ner")
    task(metric="accuracy").check_config(config, "tasks.ner")
    config.id2label, config.label2id = {0: "O", 1: "B-PER"}, {"O": 0, "B-PER": 1}
    task().check_config(config, "tasks.ner")
    config.label2id = {"O": 1, "B-PER": 0}
    with pytest.raises(InputError, match=r"label2id is .*, which is not the inverse of id2label"):
        task().check_config(config, "tasks.ner")


def test_words_need_the_spaces_between_them(pieces: PreTrainedTokenizerFast) -> None:
    check_words(pieces, "tasks.ner")
    glued = make_tokenizer()
    with pytest.raises(InputError, match=r"reads words without the spaces between them; set add_prefix_space"):
        task().notes("tasks.ner", glued, None)  # type: ignore[arg-type]
    glued.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    check_words(glued, "tasks.ner")
    ids, places = word_tokens(["ab", "c"], glued)
    assert (glued.decode(ids), places) == (" ab c", [0, 3])
