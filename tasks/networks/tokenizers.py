"""Whose tokenizer, chat template, end tokens and generation config merged models get: all from one model."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.checkpoints.companions import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    companions,
    copy_companions,
    has_tokenizer,
    is_tokenizer_file,
)
from sensmerge.tasks.checkpoints.vocabulary import Vocabulary
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.networks.template_files import chat_templates, object_in, set_template, template_texts
from sensmerge.tasks.networks.union import Asked, United, conflict_of, unite

TOKENIZER_JSON = "tokenizer.json"
BASE, UNION, AUTO = "base", "union", "auto"
WAY_OUT = "set tokenizer: {source: NAME}, NAME being base or the expert whose tokenizer merged models shall have"


@dataclass(frozen=True)
class Owner:
    """A model that merged models may get their tokenizer from."""

    key: str
    """`base`, or the recipe key of an expert"""
    folder: Path
    config: PretrainedConfig | None
    """None of an adapter, which has none of its own"""
    digest: str
    """of its tokenizer's files; models of one digest have one tokenizer"""
    rows: int
    """of its embedding"""
    trained: frozenset[int] | None = None
    """of an adapter without an embedding of its own, the rows that it changes; None: all are its own"""

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.key.removeprefix("experts.")


@dataclass(frozen=True)
class Choice:
    """What merged models get."""

    source: Owner
    added: Mapping[str, int]
    """token → id, of tokens that other models, or the recipe, add to those of the source"""
    ends: tuple[int, ...]
    """ids of the tokens that end an answer, the source's first; none where networks do not generate"""
    template: str | None = None
    """the chat template, where it is not the source's"""
    vocabulary: Vocabulary | None = None
    """where models have its tokens; None where all have it as their own"""
    readers: tuple[str, ...] = ()
    """keys of the experts whose own tokenizers can read texts for merged models: these have all of their tokens"""
    notes: tuple[str, ...] = ()
    """what a user should know of it: a line each"""

    def token_ids(self) -> dict[str, int | list[int]]:
        """Return the token ids in which the config of merged models differs from the base's."""
        if self.source.key == BASE:
            return {"eos_token_id": _one_or_list(self.ends)} if self.ends else {}
        tokenizer = load_tokenizer(self.source.folder) if has_tokenizer(self.source.folder) else None
        found = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "pad_token_id")}
        ids: dict[str, int | list[int]] = {key: one for key, one in found.items() if one is not None}
        return ids | ({"eos_token_id": _one_or_list(self.ends)} if self.ends else {})


def choose(base: Owner, experts: Sequence[Owner], asked: Asked, generates: bool) -> Choice:
    """Choose the source of tokenizer, templates, special tokens and generation config, and compare all tokenizers.

    For `union` it is the base; the first expert with a chat template if the base has none; the first that has a
    tokenizer if the base has none. The tokens of the others are added to it (see `unite`), and the end tokens of the
    others to the end tokens of the source. Of a named source, everything is as it is.

    Args:
        base: the base.
        experts: the experts.
        asked: what the recipe says.
        generates: whether merged models generate text.

    Raises:
        InputError: a named source without a tokenizer; what `unite` raises.
    """
    owners = [one for one in (base, *experts) if has_tokenizer(one.folder)]
    exact = asked.source != UNION
    source = _source(base, experts, owners, asked)
    notes = []
    if source is not base:
        what = "tokenizer, chat template, special tokens and generation config"
        why = "" if exact else f", because the base has no {'chat template' if base in owners else 'tokenizer'}"
        notes.append(f"tokenizer: merged models have the {what} of {source.key}{why}")
    models = (base, *experts)
    maps = _maps(models, owners, asked, notes)
    united = unite(source, models, maps, asked) if _differ(models, maps, asked) else None
    moves = united is not None and united.changes(models)
    added = united.added if united else {}
    if united and (moves or added):
        notes += [*united.notes, *_word_notes(source, owners, [one for one in added if one not in asked.tokens])]
    template = _asked_template(asked.chat_template, owners)
    notes += _conflicts(source, maps) if exact else []
    notes += _other_templates(source, owners) if template is None else []
    ends: list[int] = []
    if generates:
        own = end_ids(source, base, stated_only=exact)
        others = [] if exact else [one for owner in models for one in _ends_of(owner, base, united)]
        ends = list(dict.fromkeys([*own, *others]))
        more = [one for one in ends if one not in own]
        if more and own:
            notes.append(
                f"tokenizer: answers of merged models end with the tokens {', '.join(map(str, ends))}: those of "
                f"{source.key}, and {', '.join(map(str, more))} of the other models"
            )
        if source is base and not more:
            ends = []  # the base's own files say so
    vocabulary = united.vocabulary if united and moves else None
    readers = _readers(vocabulary, [one.key for one in experts if one.key in maps]) if vocabulary else ()
    texts = template_texts(source.folder) if template is None else {template}
    notes += _spelled_notes({one: maps[one] for one in readers}, [*added_tokens(source.folder), *added], texts)
    return Choice(source, added, tuple(ends), template, vocabulary, readers, tuple(notes))


def _word_notes(source: Owner, owners: Sequence[Owner], added: Sequence[str]) -> list[str]:
    """Say that words of one tokenizer's own vocabulary are in another only as texts that it looks for."""
    special = {token for one in owners for token in added_tokens(one.folder)}
    words = [token for token in added if token not in special]
    if not words:
        return []
    return [
        f"tokenizer: {len(words)} words of other tokenizers, such as {words[0]!r}, are added to that of {source.key}, "
        "which finds them only where a text holds them as they are spelled there"
    ]


def _readers(vocabulary: Vocabulary, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(one for one in keys if all(token in vocabulary.ids for token in vocabulary.models[one]))


def _spelled_notes(
    readers: Mapping[str, Mapping[str, int]], tokens: Sequence[str], templates: Collection[str]
) -> list[str]:
    """Say which added tokens of merged models' chat templates are none in an expert's own tokenizer."""
    written = [token for token in tokens if any(token in text for text in templates)]
    lacking = {key: [token for token in written if token not in own] for key, own in readers.items()}
    return [
        f"tokenizer: {key} has no token {', '.join(map(repr, found))}, which the chat template of merged models "
        "writes; in conversations it reads what the text is spelled with"
        for key, found in lacking.items()
        if found
    ]


def _differ(models: Sequence[Owner], maps: Mapping[str, Mapping[str, int]], asked: Asked) -> bool:
    """Return whether models may have other tokens than each other, or than the recipe asks for."""
    return bool(maps or asked.changes or len({one.rows for one in models}) > 1)


def _source(base: Owner, experts: Sequence[Owner], owners: Sequence[Owner], asked: Asked) -> Owner:
    """Return the model that merged models have their tokenizer from; `owners` have one."""
    if asked.source != UNION:
        source = next(one for one in (base, *experts) if one.name == asked.source)
        if source not in owners and owners:
            have = ", ".join(one.name for one in owners)
            raise InputError(
                f"tokenizer.source: {source.key} has no tokenizer in {source.folder}; expected one of {have}"
            )
        return source
    templates = [] if asked.chat_template else [one for one in owners if chat_templates(one.folder)]
    return next(iter(templates if base not in templates else []), owners[0] if owners else base)


def _ends_of(owner: Owner, base: Owner, united: United | None) -> list[int]:
    """Return the ids that end a model's answers, as merged models number them."""
    found = end_ids(owner, base)
    if united is None:
        return [one for one in found if one < base.rows]
    places = united.vocabulary.places(owner.key)
    return [places[one] for one in found if one in places]


def _generation(owner: Owner, base: Owner) -> dict[str, Any]:
    """Return a model's generation config; of an adapter without one, that of the base, which is its network."""
    path = owner.folder / GENERATION_CONFIG
    found = object_in(path if owner.config or path.is_file() else base.folder / GENERATION_CONFIG)
    try:
        GenerationConfig(**found)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: transformers cannot read it ({' '.join(str(error).split())}); correct it") from error
    return found


def end_ids(owner: Owner, base: Owner, stated_only: bool = False) -> list[int]:
    """Return the ids that end a model's answers: of its generation config, its config and its tokenizer.

    Args:
        owner: the model.
        base: the base.
        stated_only: only those of the generation config, if it has any.
    """
    stated = _generation(owner, base).get("eos_token_id")
    if stated_only and _list(stated):
        return _list(stated)
    config = owner.config or base.config
    in_config = getattr(config.get_text_config(), "eos_token_id", None) if config else None
    found = [*_list(stated), *_list(in_config)]
    if reader := read_tokenizer(owner.folder):
        found += _list(reader.eos_token_id)
    return list(dict.fromkeys(found))


def _asked_template(asked: str | None, owners: Sequence[Owner]) -> str | None:
    """Return the chat template that a recipe asks for; the first of those that as many models have."""
    if asked is not None and not owners:
        raise InputError("tokenizer.chat_template: no model has a tokenizer to put it in; leave it out")
    if asked != AUTO:
        return asked
    found = [one for one in map(_default_template, owners) if one]
    return max(found, key=found.count, default=None)


def _default_template(owner: Owner) -> str:
    """Return the chat template that a model's tokenizer uses unless another is named; "" without one."""
    reader = read_tokenizer(owner.folder)
    found: Any = None if reader is None else reader.chat_template
    return str((found.get("default") if isinstance(found, dict) else found) or "").strip()


def _other_templates(source: Owner, owners: Sequence[Owner]) -> list[str]:
    taken = template_texts(source.folder)
    other = [one for one in owners if one is not source and template_texts(one.folder) - taken]
    if not other:
        return []
    what = f"the chat template of {source.key}" if taken else "no chat template"
    return [
        f"tokenizer: merged models have {what}; {', '.join(one.key for one in other)} "
        f"{'has' if len(other) == 1 else 'have'} another: to take it, set tokenizer: {{source: {other[0].name}}}"
    ]


def _maps(
    models: Sequence[Owner], owners: Sequence[Owner], asked: Asked, notes: list[str]
) -> dict[str, dict[str, int]]:
    """Return token → id of every model's tokenizer that can be read; none where all have one and the same."""
    if len({one.digest for one in owners}) <= 1 and not _differ(models, {}, asked):
        return {}
    read: dict[str, dict[str, int] | None] = {}
    maps: dict[str, dict[str, int]] = {}
    for one in owners:
        if one.digest not in read:
            read[one.digest] = token_ids(one.folder)
            if read[one.digest] is None:
                notes.append(f"tokenizer: the one of {one.key} cannot be read, so it is not compared with the others")
        if (tokens := read[one.digest]) is not None:
            maps[one.key] = tokens
    return maps


def token_ids(folder: Path) -> dict[str, int] | None:
    """Return token → id of a folder's tokenizer; None where nothing here can read it."""
    reader = read_tokenizer(folder)
    return None if reader is None else dict(reader.get_vocab())


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return a folder's tokenizer; None where there is none that can be read here, as one with code of its own."""
    try:
        return load_tokenizer(folder) if has_tokenizer(folder) else None
    except InputError:
        return None


def _conflicts(source: Owner, maps: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a line for every tokenizer that disagrees with the source's about a token or an id."""
    notes = []
    ours = maps.get(source.key, {})
    for key, tokens in maps.items():
        if conflict := conflict_of(ours, tokens):
            notes.append(
                f"tokenizer: {source.key} and {key} differ: {conflict}; merged models have that of {source.key}"
            )
    return notes


def added_tokens(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the added tokens of a folder's tokenizer as `tokenizer.json` has them, by token.

    Raises:
        InputError: a file has them in another form.
    """
    found: dict[str, dict[str, Any]] = {}
    path = folder / TOKENIZER_CONFIG
    try:
        for id_, one in object_in(path).get("added_tokens_decoder", {}).items():
            found[str(one["content"])] = {"id": int(id_), **one}
        path = folder / TOKENIZER_JSON
        for one in object_in(path).get("added_tokens", []):
            found[str(one["content"])] = dict(one)
        path = folder / "added_tokens.json"
        for token, id_ in object_in(path).items():
            plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            found.setdefault(token, {"id": int(id_), "content": token, **plain, "special": True})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: its added tokens are not in the form that transformers writes; expected an id and, for each, an "
            "object with content: save the tokenizer again, or take another copy of the model"
        ) from error
    return found


def write_choice(choice: Choice, base: Owner, experts: Sequence[Owner], target: Path) -> None:
    """Write the tokenizer and generation config of merged models into a folder.

    Raises:
        InputError: a tokenizer that tokens cannot be added to; a chat template that is none.
    """
    source = choice.source.folder
    copy_companions({n: p for n, p in companions(source).items() if is_tokenizer_file(n)}, target)
    if choice.added:
        entries: dict[str, dict[str, Any]] = {}
        for owner in reversed((base, *experts)):
            entries |= {token: one for token, one in added_tokens(owner.folder).items() if token in choice.added}
        # A word of another tokenizer, or of the recipe: as the library adds a text.
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        entries = {token: {"content": token, **plain} for token in choice.added} | entries
        _add_tokens(target, choice, entries)
    if choice.template is not None:
        set_template(target, choice.template)
    generation = _generation(choice.source, base)
    if choice.ends:
        generation = {**choice.token_ids(), **generation, "eos_token_id": _one_or_list(choice.ends)}
    if generation:
        write_json(target / GENERATION_CONFIG, generation)


def _add_tokens(folder: Path, choice: Choice, entries: Mapping[str, Mapping[str, Any]]) -> None:
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        raise InputError(
            f"{choice.source.folder}: has no {TOKENIZER_JSON} that {', '.join(map(repr, choice.added))} could be added "
            f"to; {WAY_OUT}"
        )
    content = object_in(path)
    vocabulary = content["model"].get("vocab")
    new = sorted(choice.added.items(), key=lambda item: item[1])
    content["added_tokens"] += [{**entries[token], "id": one} for token, one in new]
    content["added_tokens"].sort(key=lambda entry: entry["id"])
    if isinstance(vocabulary, dict) and [entry["id"] for entry in content["added_tokens"]] != _numbered(content):
        # The library numbers added tokens without a gap, but for those that the vocabulary has a number for.
        vocabulary |= {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    config = object_in(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" in config:
        for token, one in new:
            config["added_tokens_decoder"][str(one)] = {k: v for k, v in entries[token].items() if k != "id"}
        write_json(folder / TOKENIZER_CONFIG, config)
    found = token_ids(folder) or {}
    wrong = [token for token, one in new if found.get(token) != one]
    if wrong:
        raise InputError(f"{choice.source.folder}: {wrong[0]!r} cannot be added to its tokenizer; {WAY_OUT}")


def _numbered(content: Mapping[str, Any]) -> list[int | None]:
    """Return the ids that the tokenizers library gives to the added tokens of a `tokenizer.json`."""
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return [tokenizer.token_to_id(entry["content"]) for entry in content["added_tokens"]]


def _list(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    return [one for one in found if isinstance(one, int)]


def _one_or_list(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
