"""Whose tokenizer, templates, end tokens and generation config merged models get."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from sensmerge.tasks.checkpoints.companions import GENERATION_CONFIG
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.tokenizers import Choice, Owner, added_tokens, choose, write_choice
from sensmerge.tasks.networks.union import Asked
from tests.conftest import llama_config

WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(37))]
"""40 words; the embedding has 48 rows."""
ROWS = 48
TEMPLATE = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|> {% endfor %}"

Build = Callable[..., Owner]


def word_tokenizer(
    added: Sequence[str] = (), template: str | None = None, eos: str = "</s>", words: Sequence[str] = WORDS
) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>")
    tokenizer.add_tokens([AddedToken(one, special=True) for one in added])
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Write a model's tokenizer and generation config."""

    def build(
        key: str,
        tokenizer: PreTrainedTokenizerFast | None = None,
        ends: int | list[int] | None = 2,
        adapter: bool = False,
        **generation: object,
    ) -> Owner:
        folder = tmp_path / key
        folder.mkdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not adapter and ends is not None:
            (folder / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": ends, **generation}))
        last = ends[-1] if isinstance(ends, list) else ends
        config = None if adapter else LlamaConfig.from_dict(llama_config().to_dict() | {"eos_token_id": last})
        return Owner(key, folder, config, key, ROWS, frozenset() if adapter else None)

    return build


def written(choice: Choice, base: Owner, experts: list[Owner], folder: Path) -> tuple[PreTrainedTokenizerFast, dict]:  # type: ignore[type-arg]
    folder.mkdir()
    write_choice(choice, base, experts, folder)
    generation = folder / GENERATION_CONFIG
    return AutoTokenizer.from_pretrained(folder), json.loads(generation.read_text()) if generation.exists() else {}


def test_equal_tokenizers_are_the_base_s(build: Build) -> None:
    base, a, b = (build(key, word_tokenizer()) for key in ("base", "experts.a", "experts.b"))
    choice = choose(base, [a, b], Asked("union"), True)
    assert (choice.source, choice.added, choice.ends, choice.notes) == (base, {}, (), ())
    assert choice.token_ids() == {}


def test_chat_experts_of_a_pretrained_base(build: Build, tmp_path: Path) -> None:
    """Template, its tokens, end tokens and generation config all come from the first expert that has a template."""
    base = build("base", word_tokenizer(), temperature=0.1)
    plain = build("experts.plain", word_tokenizer())
    chat = build("experts.chat", word_tokenizer(["<|im_start|>", "<|im_end|>"], TEMPLATE, "<|im_end|>"), 41, top_p=0.5)
    choice = choose(base, [plain, chat], Asked("union"), True)
    assert choice.source is chat
    assert choice.ends == (41, 2)
    assert choice.token_ids() == {"bos_token_id": 1, "eos_token_id": [41, 2]}
    assert "tokenizer: merged models have the tokenizer, chat template" in choice.notes[0]
    assert "of experts.chat, because the base has no chat template" in choice.notes[0]

    tokenizer, generation = written(choice, base, [plain, chat], tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(chat.folder)
    assert tokenizer.get_vocab() == theirs.get_vocab()
    messages = [{"role": "user", "content": "w1 w2"}]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == theirs.apply_chat_template(messages)["input_ids"]
    assert tokenizer.apply_chat_template(messages)["input_ids"] == [40, 4, 5, 41]
    assert tokenizer.eos_token == "<|im_end|>"
    assert generation == {"bos_token_id": 1, "eos_token_id": [41, 2], "top_p": 0.5}


def test_end_tokens_of_experts_end_a_chat_base_too(build: Build, tmp_path: Path) -> None:
    names = ["<|im_start|>", "<|im_end|>"]
    base = build("base", word_tokenizer(names, "base: {{ messages }}"), temperature=0.1)
    experts = [build(f"experts.{key}", word_tokenizer(names, TEMPLATE, "<|im_end|>"), 41) for key in "ab"]
    choice = choose(base, experts, Asked("union"), True)
    assert choice.source is base
    assert choice.ends == (2, 41)
    assert any("experts.a, experts.b have another: to take it, set tokenizer: {source: a}" in n for n in choice.notes)
    tokenizer, generation = written(choice, base, experts, tmp_path / "out")
    assert tokenizer.chat_template == "base: {{ messages }}"
    assert generation == {"eos_token_id": [2, 41], "temperature": 0.1}


def test_named_source_is_taken_as_it_is(build: Build, tmp_path: Path) -> None:
    base = build("base", word_tokenizer(template="base"))
    a = build("experts.a", word_tokenizer(["<a>", "<end>"], TEMPLATE, "<end>"), 41, top_k=3)
    b = build("experts.b", word_tokenizer(["<b>"], "b"), 40)
    choice = choose(base, [a, b], Asked("a"), True)
    tokenizer, generation = written(choice, base, [a, b], tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(a.folder).get_vocab()
    assert tokenizer.chat_template == TEMPLATE
    assert generation == {"eos_token_id": 41, "top_k": 3, "bos_token_id": 1}
    assert any("experts.a and experts.b differ: id 40 is '<a>' and '<b>'" in note for note in choice.notes)

    assert choose(base, [a, b], Asked("base"), True).source is base
    assert choose(base, [a, b], Asked("base"), True).added == {}


def test_tokens_that_several_experts_add(build: Build, tmp_path: Path) -> None:
    base = build("base", word_tokenizer())
    a = build("experts.a", word_tokenizer(["<x>", "<y>"]))
    b = build("experts.b", word_tokenizer(["<x>", "<y>", "<z>"]))
    choice = choose(base, [a, b], Asked("union"), True)
    assert choice.source is base
    assert choice.added == {"<x>": 40, "<y>": 41, "<z>": 42}
    assert choice.notes == (
        "tokenizer: experts.a adds '<x>' (40), '<y>' (41) to the tokens of base",
        "tokenizer: experts.b adds '<z>' (42) to the tokens of base",
        "tokenizer: base has no rows for '<x>' (40), '<y>' (41), '<z>' (42): those of other models stand in",
        "tokenizer: experts.a has no rows for '<z>' (42): those of other models stand in",
    )
    tokenizer, _ = written(choice, base, [a, b], tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(b.folder).get_vocab()
    assert tokenizer("w1 <y> <z> w2").input_ids == [4, 41, 42, 5]


def test_tokens_added_at_different_places(build: Build, tmp_path: Path) -> None:
    """One expert numbers its token behind a gap: no tokenizer of the inputs has all tokens."""
    base = build("base", word_tokenizer())
    a = build("experts.a", word_tokenizer(["<x>"]))
    b = build("experts.b", word_tokenizer())
    path = b.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["<z>"] = 45
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"].append({"id": 45, "content": "<z>", **entry})
    path.write_text(json.dumps(content))
    choice = choose(base, [a, b], Asked("union"), True)
    assert choice.added == {"<x>": 40, "<z>": 45}
    tokenizer, _ = written(choice, base, [a, b], tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base.folder).get_vocab() | choice.added
    assert tokenizer("w1<x>w2 <z>").input_ids == [4, 40, 5, 45]
    assert tokenizer.decode([4, 40, 45], skip_special_tokens=True) == "w1 <z>"


@pytest.mark.parametrize(
    ("ours", "theirs", "message", "added"),
    [
        (
            word_tokenizer(["<x>"]),
            word_tokenizer(["<y>"]),
            "id 40 is '<x>' and '<y>'",
            {"<x>": 40, "<y>": 41},
        ),
        (
            word_tokenizer(["<x>", "<y>"]),
            word_tokenizer(["<y>", "<z>"]),
            "id 40 is '<x>' and '<y>'",
            {"<x>": 40, "<y>": 41, "<z>": 42},
        ),
        (word_tokenizer(), word_tokenizer(words=[*WORDS[:-2], WORDS[-1], WORDS[-2]]), "id 38 is 'w35' and 'w36'", {}),
    ],
)
def test_tokens_are_told_by_their_texts(
    ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast, message: str, added: dict[str, int], build: Build
) -> None:
    """Where models number tokens differently, those of the source keep their ids and the others follow, each once."""
    base = build("base", word_tokenizer())
    experts = [build("experts.a", ours), build("experts.b", theirs)]
    choice = choose(base, experts, Asked("union"), True)
    assert choice.added == added
    assert any(f"experts.b numbers its tokens in its own way: {message}; rows are" in note for note in choice.notes)
    assert choice.vocabulary is not None
    assert choice.vocabulary.rows == ROWS
    for owner, tokenizer in zip(experts, (ours, theirs), strict=True):
        places = choice.vocabulary.places(owner.key)
        for token, row in tokenizer.get_vocab().items():
            assert places[row] == choice.vocabulary.ids[token]
    for name in ("base", "a", "b"):
        assert choose(base, experts, Asked(name), True).source.name == name


def test_tokens_without_a_row(build: Build) -> None:
    base = build("base", word_tokenizer())
    a = build("experts.a", word_tokenizer([f"<{number}>" for number in range(9)]))
    choice = choose(base, [a], Asked("union"), True)
    assert max(choice.added.values()) == ROWS - 1
    assert "tokenizer: '<8>' of experts.a is left out: its embedding has 48 rows and no row for it" in choice.notes


def test_ordinary_words_that_the_base_lacks(build: Build, tmp_path: Path) -> None:
    """They are added as words, and found where they stand in a text."""
    base = build("base", word_tokenizer())
    a = build("experts.a", word_tokenizer(words=[*WORDS, "new"]))
    choice = choose(base, [a], Asked("union"), True)
    assert choice.added == {"new": 40}
    assert any("1 words of other tokenizers, such as 'new', are added to that of base" in one for one in choice.notes)
    tokenizer, _ = written(choice, base, [a], tmp_path / "out")
    assert tokenizer("w1 new w2").input_ids == [4, 40, 5]


def test_base_without_a_tokenizer(build: Build) -> None:
    base, a = build("base"), build("experts.a", word_tokenizer(), adapter=True)
    choice = choose(base, [a], Asked("union"), True)
    assert choice.source is a
    assert "because the base has no tokenizer" in choice.notes[0]
    with pytest.raises(InputError, match=r"tokenizer.source: base has no tokenizer in .*; expected one of a"):
        choose(base, [a], Asked("base"), True)


def test_adapter_s_generation_config_is_the_base_s(build: Build, tmp_path: Path) -> None:
    base = build("base", word_tokenizer(), temperature=0.3)
    a = build("experts.a", word_tokenizer(["<|im_start|>", "<|im_end|>"], TEMPLATE, "<|im_end|>"), adapter=True)
    choice = choose(base, [a], Asked("union"), True)
    _, generation = written(choice, base, [a], tmp_path / "out")
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 41], "temperature": 0.3}


def test_networks_that_generate_nothing_have_no_end_tokens(build: Build) -> None:
    base = build("base", word_tokenizer(), None)
    a = build("experts.a", word_tokenizer(eos="w1"), None)
    choice = choose(base, [a], Asked("union"), False)
    assert (choice.ends, choice.token_ids()) == ((), {})


def test_tokenizer_that_nothing_can_read(build: Build) -> None:
    base, a = build("base", word_tokenizer()), build("experts.a")
    (a.folder / "spiece.model").write_bytes(b"no sentencepiece")
    assert choose(base, [a], Asked("union"), True).notes == (
        "tokenizer: the one of experts.a cannot be read, so it is not compared with the others",
    )


def test_base_tokenizer_that_nothing_can_read(build: Build) -> None:
    """It goes into merged models as it is; nothing is said to lack in it."""
    base, a = build("base"), build("experts.a", word_tokenizer(["<tool>"]))
    (base.folder / "spiece.model").write_bytes(b"no sentencepiece")
    choice = choose(base, [a], Asked("union"), True)
    assert (choice.source, choice.added) == (base, {})
    assert choice.notes[0] == "tokenizer: the one of base cannot be read, so it is not compared with the others"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"added_tokens": [True]}),
        ("tokenizer.json", {"added_tokens": 3}),
        ("tokenizer.json", {"added_tokens": [{"id": 3}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": None}}),
        ("added_tokens.json", {"<a>": None}),
    ],
)
def test_added_tokens_in_another_form_are_refused(file: str, content: object, tmp_path: Path) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"/{file}: its added tokens are not in the form"):
        added_tokens(tmp_path)
