"""Rows of sources and targets as samples, and what answers are worth."""

from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from torch.nn.functional import cross_entropy
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast, T5Config
from transformers import T5ForConditionalGeneration as T5

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.bleu import BLEU_COUNTS, bleu, bleu_counts
from sensmerge.tasks.kinds.seq2seq import Seq2SeqTask
from sensmerge.tasks.networks.tokens import collate
from sensmerge.tasks.stages.evaluate import evaluate_network
from tests.tasks.kinds.test_samples import bpe_tokenizer

KEY = "tasks.words.evaluation"
ROWS = [{"source": text, "target": text[::-1]} for text in ("seven", "how many", "fifteen and eight", "a")]


def task(**settings: Any) -> Seq2SeqTask:
    return Seq2SeqTask(kind="seq2seq", **settings)


def t5() -> T5:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1
    )
    return T5(config).eval()


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in SIZES.items()}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=320, d_model=32, max_position_embeddings=64, pad_token_id=2, eos_token_id=1, **sizes)
    ).eval()


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer("<s> $A </s>")


def test_source_and_target_are_what_the_tokenizer_makes_of_each(tokenizer: PreTrainedTokenizerFast) -> None:
    found = task(source="say: {source}").calibration_batch(ROWS[0], tokenizer, "row 0")
    assert found["input_ids"].tolist() == [tokenizer("say: seven").input_ids]
    assert found["labels"].tolist() == [tokenizer(text_target="neves").input_ids]
    bare = bpe_tokenizer("$A")
    assert task().sample(ROWS[0], bare, "row 0").target == [*bare("neves").input_ids, 1]


def test_what_is_too_long_loses_its_end_but_for_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for one in (tokenizer, bpe_tokenizer("$A")):
        sample = task(max_length=4, max_target_length=4).sample(ROWS[2], one, "row 2")
        assert len(sample.input_ids) == 4
        assert len(sample.target) == 4
        assert sample.target[-1] == 1
        assert sample.positions(9) == 9
        assert sample.tokens == sample.input_ids + sample.target


@pytest.mark.parametrize("make", [t5, bart])
def test_a_record_is_the_likelihood_of_the_target(make: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    network = make()
    records = evaluate_network(network, tokenizer, task(batch_size=4), [*ROWS], KEY)
    for row, record in zip(ROWS, records, strict=True):
        batch = task().calibration_batch(row, tokenizer, "row")
        with torch.no_grad():
            output = network(**batch)
        nll = cross_entropy(output.logits[0], batch["labels"][0], reduction="sum")
        assert record["nll"] == pytest.approx(float(nll), rel=1e-5)
        assert record["nll"] / record["tokens"] == pytest.approx(float(output.loss), rel=1e-5)
        assert record["correct"] == int((output.logits[0].argmax(-1) == batch["labels"][0]).sum())


@pytest.mark.parametrize("make", [t5, bart])
def test_answers_do_not_depend_on_who_stands_beside(make: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    network = make()
    found = [
        [
            record["answer"]
            for record in evaluate_network(network, tokenizer, task(batch_size=size, generate=6), [*ROWS], KEY)
        ]
        for size in (1, 4)
    ]
    assert found[0] == found[1]
    ids = torch.tensor([tokenizer(ROWS[1]["source"]).input_ids])
    start, said = network.config.decoder_start_token_id, []
    for _ in range(6):
        with torch.no_grad():
            logits = network(input_ids=ids, decoder_input_ids=torch.tensor([[start, *said]])).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == network.config.eos_token_id:
            break
    assert found[0][1] == tokenizer.decode(said, skip_special_tokens=True)


def test_an_answer_is_exact_and_has_what_bleu_is_made_of() -> None:
    right = task(generate=4).answer_record({"source": "", "target": "the cat sat down"}, "the cat sat down")
    assert right["exact"] == 1
    assert [right[name] for name in BLEU_COUNTS] == [4, 3, 2, 1, 4, 3, 2, 1, 4, 4]
    records = [{"nll": 1.0, "correct": 1, "tokens": 2} | right] * 3
    assert Seq2SeqTask.scores(records)["bleu"].value == pytest.approx(100)


def test_bleu_of_many_is_that_of_sacrebleu() -> None:
    answers = ["the cat sat on the mat today", "a dog", "hello world, this is it", "", "no word is right here"]
    expected = ["the cat sat on a mat today", "a dog runs", "hello world, that is it", "nothing", "quite other words"]
    counts = [bleu_counts(one, other) for one, other in zip(answers, expected, strict=True)]
    columns = np.array([[record[name] for name in BLEU_COUNTS] for record in counts], float)
    assert float(bleu(columns)) == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score)
    picks = np.array([[0, 0, 2, 1, 3], [4, 4, 4, 4, 4]])
    found = bleu(columns[picks])
    for pick, value in zip(picks, found, strict=True):
        theirs = sacrebleu.corpus_bleu([answers[i] for i in pick], [[expected[i] for i in pick]])
        assert value == pytest.approx(theirs.score)


def test_what_cannot_be_read_is_named() -> None:
    for settings, row, message in (
        ({}, {"source": "a"}, r"^tasks\.words\.target names field 'target', row 0 of .* has 'source'$"),
        ({}, {"source": None, "target": "b"}, r"^tasks\.words\.source names field 'source', which is null in row 0"),
        ({}, {"source": ["a"], "target": "b"}, r"names field 'source', which is a list in row 0 .*; expected a text"),
        ({}, {"source": "a", "target": " "}, r"^row 0 of .*: tasks\.words\.target gives an empty text, expected one"),
        ({"metric": "bleu"}, {"source": "a", "target": "b"}, r"metric is bleu, set tasks\.words\.generate"),
        ({"answer": "x(.)"}, {"source": "a", "target": "b"}, r"matches nothing in the completion of row 0"),
    ):
        with pytest.raises(InputError, match=message):
            task(**settings).check_rows([row], KEY)


def test_a_tokenizer_of_several_languages_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.tgt_lang = "fr_XX"
    try:
        with pytest.raises(InputError, match="marks each text with its language"):
            task().sample(ROWS[0], tokenizer, "row 0")
    finally:
        del tokenizer.tgt_lang


def test_labels_are_padded_with_what_no_loss_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [task().sample(row, tokenizer, "row").inputs for row in ROWS]
    batch = collate(samples, pad_id=2)
    for row, sample in zip(batch["labels"].tolist(), samples, strict=True):
        assert row[: len(sample["labels"])] == sample["labels"]
        assert set(row[len(sample["labels"]) :]) <= {-100}


def test_bleu_is_tuned_by_answers_and_others_by_tokens() -> None:
    assert task(metric="bleu", generate=4).for_tuning().generate == 4
    assert task(metric="perplexity", generate=4).for_tuning().generate == 0
