"""Whose tokenizer, chat template, end tokens and generation config merged models get: all from one model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sensmerge.tasks.artifacts import load_object, write_json
from sensmerge.tasks.checkpoints.companions import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    companions,
    copy_companions,
    has_tokenizer,
    is_tokenizer_file,
)
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import load_tokenizer

TOKENIZER_JSON = "tokenizer.json"
BASE, UNION = "base", "union"
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

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.key.removeprefix("experts.")


@dataclass(frozen=True)
class Choice:
    """What merged models get."""

    source: Owner
    added: Mapping[str, int]
    """token → id, of tokens that other models add to those of the source"""
    ends: tuple[int, ...]
    """ids of the tokens that end an answer, the source's first; none where networks do not generate"""
    notes: tuple[str, ...] = ()
    """what a user should know of it: a line each"""

    def token_ids(self) -> dict[str, int | list[int]]:
        """Return the token ids in which the config of merged models differs from the base's."""
        if self.source.key == BASE:
            return {"eos_token_id": _one_or_list(self.ends)} if self.ends else {}
        tokenizer = load_tokenizer(self.source.folder)
        found = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        ids: dict[str, int | list[int]] = {key: one for key, one in found.items() if one is not None}
        return ids | ({"eos_token_id": _one_or_list(self.ends)} if self.ends else {})


def choose(base: Owner, experts: Sequence[Owner], named: str, rows: int, generates: bool) -> Choice:
    """Choose the source of tokenizer, templates, special tokens and generation config, and compare all tokenizers.

    For `union` it is the base; the first expert with a chat template if the base has none; the first that has a
    tokenizer if the base has none. Tokens of the others which lie in rows of the embedding that the source
    leaves unused are added to it, and the end tokens of the others to the end tokens of the source. Of a named source,
    everything is as it is.

    Args:
        base: the base.
        experts: the experts.
        named: what the recipe says: `union`, `base` or the name of an expert.
        rows: of the embedding.
        generates: whether merged models generate text.

    Raises:
        InputError: a named source without a tokenizer; tokenizers that give one id two tokens or one token two ids.
    """
    owners = [one for one in (base, *experts) if has_tokenizer(one.folder)]
    exact = named != UNION
    if exact:
        source = next(one for one in (base, *experts) if one.name == named)
        if source not in owners:
            have = ", ".join(one.name for one in owners) or "none has one"
            raise InputError(
                f"tokenizer.source: {source.key} has no tokenizer in {source.folder}; expected one of {have}"
            )
    else:
        templates = [one for one in owners if chat_templates(one.folder)]
        source = next(iter(templates if base not in templates else []), owners[0] if owners else base)
    notes = []
    if source is not base:
        what = "tokenizer, chat template, special tokens and generation config"
        why = "" if exact else f", because the base has no {'chat template' if base in owners else 'tokenizer'}"
        notes.append(f"tokenizer: merged models have the {what} of {source.key}{why}")
    maps = _distinct_maps(source, owners, notes)
    added, said = ({}, _conflicts(source, maps)) if exact else _union(source, maps, owners, rows)
    notes += said + _other_templates(source, owners)
    ends: list[int] = []
    if generates:
        own = end_ids(source, base, stated_only=exact)
        others = [one for owner in (base, *experts) for one in end_ids(owner, base)] if not exact else []
        ends = list(dict.fromkeys([*own, *(one for one in others if one < rows)]))
        more = [one for one in ends if one not in own]
        if more and own:
            notes.append(
                f"tokenizer: answers of merged models end with the tokens {', '.join(map(str, ends))}: those of "
                f"{source.key}, and {', '.join(map(str, more))} of the other models"
            )
        if source is base and not more:
            ends = []  # the base's own files say so
    return Choice(source, added, tuple(ends), tuple(notes))


def _generation(owner: Owner, base: Owner) -> dict[str, Any]:
    """Return a model's generation config; of an adapter without one, that of the base, which is its network."""
    path = owner.folder / GENERATION_CONFIG
    return _object(path if owner.config or path.is_file() else base.folder / GENERATION_CONFIG)


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


def chat_templates(folder: Path) -> dict[str, Any]:
    """Return what a model's files hold of chat templates, by file."""
    found: dict[str, Any] = {
        name: _text(path)
        for name, path in companions(folder).items()
        if name.startswith(("chat_template.", "additional_chat_templates/"))
    }
    stated = _object(folder / TOKENIZER_CONFIG).get("chat_template")
    return found | ({TOKENIZER_CONFIG: stated} if stated else {})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save the file as UTF-8, or leave it out") from None


def _templates(folder: Path) -> set[str]:
    """Return the texts of all chat templates, whichever file they are in."""
    texts: set[str] = set()
    for name, found in chat_templates(folder).items():
        if name.endswith(".json"):
            found = _object(folder / name).get("chat_template") if name != TOKENIZER_CONFIG else found
        entries = found if isinstance(found, list) else [found]
        texts |= {one["template"] if isinstance(one, dict) else str(one) for one in entries}
    return texts


def _other_templates(source: Owner, owners: Sequence[Owner]) -> list[str]:
    taken = _templates(source.folder)
    other = [one for one in owners if one is not source and _templates(one.folder) - taken]
    if not other:
        return []
    what = f"the chat template of {source.key}" if taken else "no chat template"
    return [
        f"tokenizer: merged models have {what}; {', '.join(one.key for one in other)} "
        f"{'has' if len(other) == 1 else 'have'} another: to take it, set tokenizer: {{source: {other[0].name}}}"
    ]


def _distinct_maps(source: Owner, owners: Sequence[Owner], notes: list[str]) -> dict[str, dict[str, int]]:
    """Return token → id of every model's tokenizer, the source's first; of equal files, once."""
    seen: set[str] = set()
    ordered = [one for one in owners if one is source] + [one for one in owners if one is not source]
    if len({one.digest for one in ordered}) <= 1:
        return {}
    maps: dict[str, dict[str, int]] = {}
    for one in ordered:
        if one.digest in seen:
            continue
        seen.add(one.digest)
        tokens = token_ids(one.folder)
        if tokens is None:
            notes.append(f"tokenizer: the one of {one.key} cannot be read, so it is not compared with the others")
        else:
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
        if conflict := _conflict(ours, tokens):
            notes.append(
                f"tokenizer: {source.key} and {key} differ: {conflict}; merged models have that of {source.key}"
            )
    return notes


def _conflict(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """Say where two maps give one id two tokens, or one token two ids: the lowest id; None where they agree."""
    by_id = {one: token for token, one in ours.items()}
    for token, one in sorted(theirs.items(), key=lambda item: item[1]):
        if by_id.get(one, token) != token:
            return f"id {one} is {by_id[one]!r} and {token!r}"
        if ours.get(token, one) != one:
            return f"{token!r} has the ids {ours[token]} and {one}"
    return None


def _union(
    source: Owner, maps: Mapping[str, Mapping[str, int]], owners: Sequence[Owner], rows: int
) -> tuple[dict[str, int], list[str]]:
    """Return what the others add to the source's tokens.

    Raises:
        InputError: two of them disagree, or a token is no added one.
    """
    if source.key not in maps:
        return {}, []  # it cannot be read, which has been said, or is the only one
    known = dict(maps[source.key])
    added: dict[str, int] = {}
    notes = []
    folders = {one.key: one.folder for one in owners}
    for key, tokens in maps.items():
        if conflict := _conflict(known, tokens):
            pair = next(other for other, theirs in maps.items() if _conflict(theirs, tokens))
            raise InputError(f"{key}: its tokenizer and that of {pair} disagree: {conflict}; {WAY_OUT}")
        new = {token: one for token, one in tokens.items() if token not in known}
        beyond = sorted(token for token, one in new.items() if one >= rows)
        if beyond:
            notes.append(
                f"tokenizer: {', '.join(map(repr, beyond[:5]))} of {key} {'is' if len(beyond) == 1 else 'are'} left "
                f"out: the embedding has {rows} rows and no row for {'it' if len(beyond) == 1 else 'them'}"
            )
        new = {token: one for token, one in new.items() if one < rows}
        ordinary = sorted(new.keys() - added_tokens(folders[key]).keys())
        if ordinary:
            raise InputError(
                f"{key}: its tokenizer has {ordinary[0]!r} (id {new[ordinary[0]]}), which that of {source.key} lacks "
                f"and which is not an added token; {WAY_OUT}"
            )
        if new:
            listed = ", ".join(f"{token!r} ({one})" for token, one in sorted(new.items(), key=lambda item: item[1])[:5])
            more = f" and {len(new) - 5} more" if len(new) > 5 else ""
            notes.append(f"tokenizer: {key} adds {listed}{more} to the tokens of {source.key}")
        known |= new
        added |= new
    return added, notes


def added_tokens(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the added tokens of a folder's tokenizer as `tokenizer.json` has them, by token."""
    found = {
        str(one["content"]): {"id": int(id_), **one}
        for id_, one in _object(folder / TOKENIZER_CONFIG).get("added_tokens_decoder", {}).items()
    }
    found |= {str(one["content"]): one for one in _object(folder / TOKENIZER_JSON).get("added_tokens", [])}
    for token, id_ in _object(folder / "added_tokens.json").items():
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        found.setdefault(token, {"id": id_, "content": token, **plain, "special": True})
    return found


def write_choice(choice: Choice, base: Owner, experts: Sequence[Owner], target: Path) -> None:
    """Write the tokenizer and generation config of merged models into a folder.

    Raises:
        InputError: a tokenizer that tokens cannot be added to.
    """
    source = choice.source.folder
    copy_companions({n: p for n, p in companions(source).items() if is_tokenizer_file(n)}, target)
    if choice.added:
        entries: dict[str, dict[str, Any]] = {}
        for owner in reversed((base, *experts)):
            entries |= {token: one for token, one in added_tokens(owner.folder).items() if token in choice.added}
        _add_tokens(target, choice, entries)
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
    content = _object(path)
    vocabulary = content["model"].get("vocab")
    new = sorted(choice.added.items(), key=lambda item: item[1])
    content["added_tokens"] += [{**entries[token], "id": one} for token, one in new]
    content["added_tokens"].sort(key=lambda entry: entry["id"])
    if isinstance(vocabulary, dict) and [entry["id"] for entry in content["added_tokens"]] != _numbered(content):
        # The library numbers added tokens without a gap, but for those that the vocabulary has a number for.
        vocabulary |= {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    config = _object(folder / TOKENIZER_CONFIG)
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


def _object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty where there is none; raises InputError if it is no JSON object."""
    return load_object(path) if path.is_file() else {}


def _list(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    return [one for one in found if isinstance(one, int)]


def _one_or_list(ids: Sequence[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
