"""The tokens of merged models: which there are, which rows they have, and where every model has them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sensmerge.tasks.checkpoints.vocabulary import ModelRow, Token, TokenRow, Vocabulary
from sensmerge.tasks.errors import InputError

_SHOWN = 5


@dataclass(frozen=True)
class Wanted:
    """What a recipe wants a token to have: the row of a model's token, or zeros."""

    model: str | None
    """`base` or the recipe key of an expert; None: zeros"""
    token: str | None = None
    """None: the same token"""
    number: int | None = None
    """row of the model, instead of a token"""
    force: bool = False
    """whether all models have it, and not only those that lack the token"""


@dataclass(frozen=True)
class Asked:
    """What a recipe says of the tokens of merged models."""

    source: str
    """`union`, `base` or the name of an expert"""
    pad_to_multiple_of: int | None = None
    """None keeps the rows without a token that the source has"""
    tokens: Mapping[str, Wanted] = field(default_factory=dict)
    chat_template: str | None = None
    """a template; `auto`: that of most models; None: the source's"""

    @property
    def changes(self) -> bool:
        """Whether rows are asked for that no model may have."""
        return self.pad_to_multiple_of is not None or bool(self.tokens)


class TokenOwner(Protocol):
    """A model with tokens."""

    @property
    def key(self) -> str:
        """`base`, or the recipe key of an expert."""

    @property
    def rows(self) -> int:
        """Rows of its embedding."""

    @property
    def trained(self) -> frozenset[int] | None:
        """Rows that are its own; None: all of them. The others of an adapter are the base's."""


@dataclass(frozen=True)
class United:
    """The tokens of merged models."""

    vocabulary: Vocabulary
    added: Mapping[str, int]
    """token → id, of tokens that the source's tokenizer lacks"""
    notes: tuple[str, ...]

    def changes(self, owners: Sequence[TokenOwner]) -> bool:
        """Return whether a model must be seen in another vocabulary than its own."""
        base, *_ = owners
        return not all(
            # An adapter that leaves all rows as the base has them follows the base, whatever tokens it does not name.
            self.vocabulary.is_that_of(one.key, one.rows)
            or (one.rows == base.rows and not one.trained and one.trained is not None and self._keeps_places(one.key))
            for one in owners
        )

    def _keeps_places(self, model: str) -> bool:
        return all(self.vocabulary.ids.get(token, row) == row for token, row in self.vocabulary.models[model].items())


def unite(
    source: TokenOwner, owners: Sequence[TokenOwner], maps: Mapping[str, Mapping[str, int]], asked: Asked
) -> United:
    """Return the tokens of merged models.

    The source's tokens keep their ids. Where the models agree on the ids of those that others add, they keep theirs;
    otherwise they are numbered behind the source's, model by model.

    Args:
        source: whose tokenizer merged models get.
        owners: all models, the base first.
        maps: model → token → id, of all tokenizers that can be read; models without one have the base's. If that of
            the source is none of them, rows of one number are of one token.
        asked: what the recipe says.

    Raises:
        InputError: a row is asked for that its model does not have.
    """
    known = dict(maps.get(source.key, {}))
    texts = _texts(owners, maps, maps.get(owners[0].key, known)) if known else {one.key: {} for one in owners}
    having = {token for own in texts.values() for token in own}
    added, notes = ({}, []) if asked.source != "union" else _added(source, known, owners, texts)
    start = max([*known.values(), *added.values()], default=-1) + 1
    missing = [token for token in asked.tokens if token not in known and token not in added]
    added |= {token: start + place for place, token in enumerate(missing)}
    ids: dict[Token, int] = {token: one for token, one in known.items() if token in having or token in asked.tokens}
    ids.update(added)
    rows = max([source.rows, *(one + 1 for one in ids.values())])
    multiple = asked.pad_to_multiple_of
    if not known and asked.source == "union":
        rows = max(one.rows for one in owners)
    if multiple is None or not known:
        taken = set(ids.values())
        ids |= {number: number for number in range(rows) if number not in taken}
    if multiple is not None:
        rows = math.ceil((max(ids.values(), default=-1) + 1) / multiple) * multiple
    models = {one.key: _with_numbers(one, texts[one.key], ids) for one in owners}
    _drop_untrained(owners, models)
    wanted: dict[Token, TokenRow] = {token: _row(token, one, owners, texts) for token, one in asked.tokens.items()}
    vocabulary = Vocabulary(ids, rows, models, wanted)
    return United(vocabulary, added, (*notes, *_notes(vocabulary, owners, texts, maps)))


def _texts(
    owners: Sequence[TokenOwner], maps: Mapping[str, Mapping[str, int]], otherwise: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Return token → row of every model, of the tokens that it has a row for."""
    return {
        one.key: {token: row for token, row in maps.get(one.key, otherwise).items() if row < one.rows} for one in owners
    }


def _added(
    source: TokenOwner,
    known: Mapping[str, int],
    owners: Sequence[TokenOwner],
    texts: Mapping[str, Mapping[str, int]],
) -> tuple[dict[str, int], list[str]]:
    """Return the ids of the tokens that models add to the source's, and what is to be said of them."""
    notes: list[str] = []
    together, agree = dict(known), True
    for one in owners:
        if conflict := conflict_of(together, texts[one.key]):
            agree = False
            notes.append(
                f"tokenizer: {one.key} numbers its tokens in its own way: {conflict}; rows are matched by their tokens"
            )
        together |= {token: row for token, row in _ordered(texts[one.key]) if token not in together}
    new = [token for token in together if token not in known]
    start = max(known.values(), default=-1) + 1
    added = {token: together[token] if agree else start + place for place, token in enumerate(new)}
    for one in owners:
        own = {token: added[token] for token in texts[one.key] if token in new}
        new = [token for token in new if token not in own]
        if own:
            notes.append(f"tokenizer: {one.key} adds {_listed(own)} to the tokens of {source.key}")
    return added, notes


def _ordered(tokens: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(tokens.items(), key=lambda item: item[1])


def conflict_of(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """Say where two maps give one id two tokens, or one token two ids: the lowest id; None where they agree."""
    by_id = {one: token for token, one in ours.items()}
    for token, one in _ordered(theirs):
        if by_id.get(one, token) != token:
            return f"id {one} is {by_id[one]!r} and {token!r}"
        if ours.get(token, one) != one:
            return f"{token!r} has the ids {ours[token]} and {one}"
    return None


def _with_numbers(owner: TokenOwner, texts: Mapping[str, int], ids: Mapping[Token, int]) -> dict[Token, int]:
    """Return the rows of a model by token, those without one by their number where merged models have it, too."""
    named = set(texts.values())
    found: dict[Token, int] = {one: one for one in range(owner.rows) if one in ids and one not in named}
    found.update(texts)
    return found


def _drop_untrained(owners: Sequence[TokenOwner], models: Mapping[str, dict[Token, int]]) -> None:
    """Have no adapter lend a row that it leaves as the base has it, to a token that the base lacks.

    Where nobody else has such a token, the base has it, too: its row is what all of them use.
    """
    base, *_ = models.values()
    for owner in owners:
        own = models[owner.key]
        if owner.trained is None:
            continue
        for token, row in list(own.items()):
            if token in base or row in owner.trained:
                continue
            others = [(one.trained, models[one.key][token]) for one in owners if token in models[one.key]]
            strong = any(trained is None or place in trained for trained, place in others)
            if strong:
                del own[token]
            else:
                base[token] = row


def _row(token: str, wanted: Wanted, owners: Sequence[TokenOwner], texts: Mapping[str, Mapping[str, int]]) -> TokenRow:
    where = f"tokenizer.tokens.{token}.source"
    if wanted.model is None:
        return TokenRow(None, wanted.force)
    rows = next(one.rows for one in owners if one.key == wanted.model)
    number = wanted.number
    if number is None:
        found = token if wanted.token is None else wanted.token
        number = texts[wanted.model].get(found)
        if number is None:
            raise InputError(f"{where}: {wanted.model} has no token {found!r}; name a model that has it")
    elif not 0 <= number < rows:
        raise InputError(f"{where}.token_id: found {number}; expected a row of {wanted.model}, 0 to {rows - 1}")
    return TokenRow(ModelRow(wanted.model, number), wanted.force)


def _notes(
    vocabulary: Vocabulary,
    owners: Sequence[TokenOwner],
    texts: Mapping[str, Mapping[str, int]],
    maps: Mapping[str, Mapping[str, int]],
) -> Iterator[str]:
    base = owners[0]
    if not maps:
        yield "tokenizer: no tokenizer tells what rows are of, so rows of one number are taken to be of one token"
    unlike = [one for one in owners if one.rows != vocabulary.rows]
    if base in unlike:
        yield f"tokenizer: embeddings of merged models have {vocabulary.rows} rows; those of the base have {base.rows}"
    elif unlike:
        sizes = ", ".join(f"{one.rows} in {one.key}" for one in unlike)
        yield f"tokenizer: embeddings of merged models have the base's {vocabulary.rows} rows; there are {sizes}"
    for one in owners:
        own = vocabulary.models[one.key]
        lacking = {token: row for token, row in vocabulary.ids.items() if isinstance(token, str) and token not in own}
        if lacking:
            yield f"tokenizer: {one.key} has no rows for {_listed(lacking)}: those of other models stand in"
        beyond = [token for token, row in _ordered(maps.get(one.key, {})) if row >= one.rows]
        unknown = [repr(token) for token in beyond if token not in vocabulary.ids]
        if one.key != base.key and unknown:
            it = "it" if len(unknown) == 1 else "them"
            yield (
                f"tokenizer: {', '.join(unknown[:_SHOWN])} of {one.key} {'is' if it == 'it' else 'are'} left out: its "
                f"embedding has {one.rows} rows and no row for {it}"
            )
        lost = {token: row for token, row in texts[one.key].items() if token not in vocabulary.ids}
        if lost:
            yield f"tokenizer: merged models are without {_listed(lost)} of {one.key}"
        left = one.rows - len(lost) - len(vocabulary.places(one.key))
        if one.rows > vocabulary.rows and left > 0:
            yield f"tokenizer: {left} rows of {one.key} that no token is of are left out"


def _listed(tokens: Mapping[str, int]) -> str:
    shown = ", ".join(f"{token!r} ({one})" for token, one in _ordered(tokens)[:_SHOWN])
    return shown + (f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else "")
