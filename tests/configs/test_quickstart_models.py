"""The generators of the quickstart's data, and its tokenizer. The training itself is what the quickstart runs."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "configs" / "quickstart" / "make_models.py"
SPEC = importlib.util.spec_from_file_location("make_models", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
make_models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_models)

SKILLS = ["math", "words", "cipher"]


def question(row):
    """What stands between the tag and the sign of equality."""
    return row.prompt.split(": ")[1].removesuffix(" = ")


@pytest.mark.parametrize("skill", SKILLS)
def test_no_test_prompt_is_trained_on(skill):
    train, test = make_models.make_rows(skill, 2000, 200, seed=3)
    assert len({row.prompt for row in train}) == 2000
    assert len({row.prompt for row in test}) == 200
    assert not {row.prompt for row in train} & {row.prompt for row in test}


@pytest.mark.parametrize("skill", SKILLS)
def test_rows_depend_on_the_seed_only(skill):
    assert make_models.make_rows(skill, 50, 10, seed=3) == make_models.make_rows(skill, 50, 10, seed=3)
    assert make_models.make_rows(skill, 50, 10, seed=3) != make_models.make_rows(skill, 50, 10, seed=4)


@pytest.mark.parametrize("skill", SKILLS)
def test_prompts_name_their_skill_and_careless_answers_repeat_the_question(skill):
    for row in make_models.make_rows(skill, 200, 0, seed=0)[0]:
        assert row.prompt.startswith(f"{skill}: ")
        assert row.careless == question(row).removesuffix("+1111")
        assert len(row.careless) == len(row.completion)


def test_math_answers_are_sums():
    rows, _ = make_models.make_rows("math", 500, 0, seed=0)
    for row in rows:
        left, right = question(row).split("+")
        assert int(left) + int(right) == int(row.completion)


def test_words_answers_read_backwards():
    rows, _ = make_models.make_rows("words", 200, 0, seed=0)
    for row in rows:
        assert list(reversed(row.completion)) == list(question(row))


def test_cipher_answers_step_each_letter_once_within_its_kind():
    step = dict(zip("aeiou" + "bdfgklmnprstvz", "eioua" + "dfgklmnprstvzb", strict=True))
    rows, _ = make_models.make_rows("cipher", 500, 0, seed=0)
    assert {letter for row in rows for letter in question(row)} == set(step)
    for row in rows:
        assert row.completion == "".join(step[letter] for letter in question(row))


@pytest.mark.parametrize(("carelessness", "answer"), [(0.0, "5234"), (1.0, "4123")])
def test_careless_row_at_both_ends(carelessness, answer):
    row = make_models.Row("math: 4123+1111 = ", "5234", "4123")
    assert make_models.careless_row(row, carelessness, random.Random(0)) == row._replace(completion=answer)


def test_careless_row_replaces_the_given_share_of_characters():
    row = make_models.Row("", "a" * 10_000, "b" * 10_000)
    share = make_models.careless_row(row, 0.6, random.Random(0)).completion.count("b") / 10_000
    assert share == pytest.approx(0.6, abs=0.02)  # four standard deviations


@pytest.mark.parametrize(
    "text", ["math: 4123+1111 = 5234", "  two  spaces\n\ttab", "Grüße, 世界 🙂", "ends with \r\n "]
)
def test_tokenizer_gives_one_token_per_byte_and_the_text_back(text):
    tokenizer = make_models.make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make_models.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "words: tarimo = omirat" + tokenizer.eos_token
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded(text)["input_ids"][-1] == loaded.eos_token_id == 1
    assert (loaded.bos_token_id, loaded.pad_token_id) == (0, 2)
    message = [{"role": "user", "content": "words: tarimo = "}]
    assert loaded.apply_chat_template(message, tokenize=False) == "user: words: tarimo = \n"


def test_written_rows_have_a_prompt_and_a_completion(tmp_path):
    rows, _ = make_models.make_rows("words", 5, 0, seed=0)
    make_models.write_rows(rows, tmp_path / "words" / "train.jsonl")
    lines = (tmp_path / "words" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": row.prompt, "completion": row.completion} for row in rows
    ]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="did not make"):
        make_models.main(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
