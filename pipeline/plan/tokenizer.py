"""The tokenizer and generation config that all models of a recipe are run with and merged models get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from sensmerge.pipeline.plan.models import about
from sensmerge.pipeline.plan.seen import Seen, Tokenizer
from sensmerge.pipeline.plan.vocabulary import in_vocabulary, settled
from sensmerge.pipeline.recipe.tokenizer import TokenizerSettings, TokenOfModel
from sensmerge.tasks.artifacts import Artifact, canonical, sha256_file, sha256_text
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint, open_checkpoint
from sensmerge.tasks.checkpoints.companions import (
    CONFIG,
    GENERATION_CONFIG,
    LARGEST,
    companions,
    has_tokenizer,
    is_companion,
    is_tokenizer_file,
    local_files,
    names_code,
)
from sensmerge.tasks.checkpoints.header import read_header
from sensmerge.tasks.checkpoints.layers import in_block
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.checkpoints.views import TOKENIZERS
from sensmerge.tasks.checkpoints.vocabulary import plain_vocabulary
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter import ADAPTER_WEIGHTS
from sensmerge.tasks.networks.compare import check_sizes
from sensmerge.tasks.networks.expert import is_adapter
from sensmerge.tasks.networks.networks import load_config, network_class
from sensmerge.tasks.networks.tokenizers import BASE, UNION, Owner, choose, write_choice
from sensmerge.tasks.networks.union import Asked, Wanted
from sensmerge.tasks.networks.views import Member, TokenTensor, adapter_member, whole_member


@dataclass(frozen=True)
class Unopened:
    """A model of which only small files and headers were looked at."""

    listing: Listing
    folder: Path
    headers: Checkpoint | None
    """None where its weights are in the folder"""

    def checkpoint(self) -> Checkpoint:
        """Return the headers of a whole model, or of an adapter.

        Raises:
            InputError: its weights cannot be read.
        """
        if self.headers is not None:
            return self.headers
        adapter = self.folder / ADAPTER_WEIGHTS
        return Checkpoint(self.folder, read_header(adapter)) if adapter.is_file() else open_checkpoint(self.folder)


def choose_tokenizer(
    settings: TokenizerSettings, models: Mapping[str, Unopened], cache: Path
) -> tuple[Tokenizer, list[str]]:
    """Choose whose tokenizer it is; one that no model has as it is, is written below the cache.

    Args:
        settings: the recipe's `tokenizer`.
        models: base and experts by name.
        cache: the hub's cache, which all workers see.

    Returns:
        The tokenizer, and what a user should know of it: a line each.

    Raises:
        InputError: what `choose`, `write_choice` and `in_vocabulary` raise.
    """
    with about(BASE):
        base = whole_owner(BASE, models[BASE])
        generates = network_class(_config(base), None, base.folder).can_generate()
    experts = [_owner(name, one, base, models[BASE]) for name, one in models.items() if name != BASE]
    choice = choose(base, experts, _asked(settings), generates)
    ids = choice.token_ids()
    folder = base.folder
    if choice.source is not base or choice.added or choice.ends or choice.template is not None:
        folder = settled(cache / TOKENIZERS, lambda target: write_choice(choice, base, experts, target))
    digests, stated = _digests(folder)
    about_it = [digests, stated, ids]
    seen: dict[str, Seen] = {}
    # Where all have one vocabulary, what holds single rows of an embedding alone is to be seen as a whole.
    keys = [one.key for one in (base, *experts) if choice.vocabulary is not None or one.trained]
    if keys:
        members = _members(models, [base, *experts])
        for one in members[1:]:
            if one.config is not None and members[0].config is not None:
                check_sizes(one.config, members[0].config, f"{one.key}: {one.folder}", but=("vocab_size",))
        vocabulary = choice.vocabulary or plain_vocabulary(base.rows, [one.key for one in members])
        seen = in_vocabulary(vocabulary, members, keys, folder, cache)
        about_it.append({name: one.digest for name, one in seen.items()})
    readers = {
        # Its own tokens, their ids, and the chat template of merged models.
        one.name: Artifact(sha256_text(canonical([one.digest, seen[one.name].digest, digests])), seen[one.name].folder)
        for one in experts
        if one.key in choice.readers
    }
    tokenizer = Tokenizer(folder, sha256_text(canonical(digests)), sha256_text(canonical(about_it)), ids, seen, readers)
    return tokenizer, [*choice.notes, *_code_notes(base.folder, folder), *_large_notes(base.folder)]


def tokenizer_by_name(settings: TokenizerSettings, folders: Mapping[str, Path]) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer, if there is any, of models that are merged by name: the base's, or the named one's.

    Args:
        settings: the recipe's `tokenizer`.
        folders: of base and experts, by name.

    Returns:
        The tokenizer, and what a user should know of it: a line each.

    Raises:
        InputError: the named model has no tokenizer, or the settings say more than a name.
    """
    for key in ("tokens", "pad_to_multiple_of", "chat_template"):
        if getattr(settings, key):
            raise InputError(
                f"tokenizer.{key}: models that are merged by the names of their tensors keep their rows and files as "
                "they are; leave the key out"
            )
    source = BASE if settings.source == UNION else settings.source
    if settings.source != UNION and not has_tokenizer(folders[source]):
        raise InputError(f"tokenizer.source: {source} has no tokenizer in {folders[source]}; leave the key out")
    tokenizer = _tokenizer_in(folders[source])
    others = [name for name, one in folders.items() if has_tokenizer(one)]
    unlike = [name for name in others if _tokenizer_in(folders[name]).digest != tokenizer.digest]
    notes = [*_code_notes(folders[BASE], folders[source]), *_large_notes(folders[BASE])]
    if unlike:
        notes.append(
            f"tokenizer: merged models have the files of {source}; those of {', '.join(unlike)} differ, and are not "
            "compared where models are merged by name"
        )
    return tokenizer, notes


def _tokenizer_in(folder: Path) -> Tokenizer:
    digests, stated = _digests(folder)
    return Tokenizer(folder, sha256_text(canonical(digests)), sha256_text(canonical([digests, stated, {}])))


def _digests(folder: Path) -> tuple[dict[str, str], str | None]:
    """Return the digests of a tokenizer's files by their names, and that of the generation config beside them."""
    files = {name: path for name, path in companions(folder).items() if is_tokenizer_file(name)}
    generation = folder / GENERATION_CONFIG
    stated = sha256_file(generation) if generation.is_file() else None
    return {name: sha256_file(path) for name, path in files.items()}, stated


def whole_owner(key: str, model: Unopened) -> Owner:
    """Return a whole model; raises InputError for a config that cannot be read."""
    config = load_config(model.folder)
    return Owner(key, model.folder, config, _digest(model.listing), _rows(config))


def _owner(name: str, model: Unopened, base: Owner, of_base: Unopened) -> Owner:
    key = f"experts.{name}"
    with about(key):
        if not is_adapter(model.folder, model.headers, key):
            return whole_owner(key, model)
        headers = model.checkpoint()
        digest, rows = _digest(model.listing), base.rows
        found: Sequence[TokenTensor] = ()
        if any(not in_block(one) for one in headers.tensors):
            found = adapter_member(key, headers, _member(of_base, base)).tensors
        whole = [
            headers.tensors[one.name].shape[one.axis] for one in found if not one.is_change and one.trained is None
        ]
        if whole:
            return Owner(key, model.folder, None, digest, whole[0])
        if any(one.is_change for one in found):
            return Owner(key, model.folder, None, digest, rows)
        trained = frozenset(row for one in found for row in one.trained or ())
        return Owner(key, model.folder, None, digest, rows, trained)


def _member(model: Unopened, owner: Owner) -> Member:
    return whole_member(owner.key, model.checkpoint(), _config(owner))


def _members(models: Mapping[str, Unopened], owners: Sequence[Owner]) -> list[Member]:
    """Return the models whose tokens merged models have."""
    members: list[Member] = []
    for model, owner in zip(models.values(), owners, strict=True):
        with about(owner.key):
            whole = owner.config is not None
            members.append(
                _member(model, owner) if whole else adapter_member(owner.key, model.checkpoint(), members[0])
            )
    return members


def _config(owner: Owner) -> PretrainedConfig:
    assert owner.config is not None, "a whole model has a config"
    return owner.config


def _rows(config: PretrainedConfig) -> int:
    return int(getattr(config.get_text_config(), "vocab_size", None) or 0)


def _asked(settings: TokenizerSettings) -> Asked:
    """Return what a recipe says of tokens, with models by their keys."""

    def key(name: str) -> str:
        return name if name == BASE else f"experts.{name}"

    tokens = {}
    for token, one in settings.tokens.items():
        match one.source:
            case str(name):
                tokens[token] = Wanted(key(name), force=one.force)
            case TokenOfModel(model=name, token=found, token_id=number):
                tokens[token] = Wanted(key(name), found, number, one.force)
            case _:
                tokens[token] = Wanted(None, force=one.force)
    return Asked(settings.source, settings.pad_to_multiple_of, tokens, settings.chat_template)


def _digest(listing: Listing) -> str:
    return sha256_text(canonical([[one.name, one.digest] for one in listing.files if is_tokenizer_file(one.name)]))


def _code_notes(base: Path, tokenizer: Path) -> list[str]:
    files = [path for path in [base / CONFIG] if path.is_file()]
    files += [*companions(base).values(), *companions(tokenizer).values()]
    named = sorted({path.name for path in files if names_code(path)})
    if not named:
        return []
    return [
        f"base: {', '.join(named)} {'names' if len(named) == 1 else 'name'} code (auto_map), which is never run; "
        "merged models are without it"
    ]


def _large_notes(base: Path) -> list[str]:
    files = {name: path.stat().st_size for name, path in local_files(base).items() if is_companion(name, 0)}
    large = [name for name, size in files.items() if not is_companion(name, size)]
    if not large:
        return []
    return [f"base: {', '.join(large)}, of more than {LARGEST // 2**20} MiB, is left out of merged models"]
