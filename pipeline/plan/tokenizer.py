"""The tokenizer and generation config that all models of a recipe are run with and merged models get."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from sensmerge.tasks.artifacts import canonical, sha256_file, sha256_text
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
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import Base
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import network_class
from sensmerge.tasks.networks.tokenizers import BASE, UNION, Choice, Owner, choose, write_choice


@dataclass(frozen=True)
class Tokenizer:
    """A folder with tokenizer, chat templates and generation config."""

    folder: Path
    digest: str
    """content digest of the tokenizer's files"""
    companions_digest: str
    """content digest of these, the generation config and `token_ids`"""
    token_ids: Mapping[str, int | list[int]] = field(default_factory=dict)
    """special tokens for which configs of merged models differ from the base's"""


def choose_tokenizer(
    named: str, base: Base, experts: Mapping[str, Expert], listings: Mapping[str, Listing], cache: Path
) -> tuple[Tokenizer, list[str]]:
    """Choose whose tokenizer it is; one that no model has as it is, is written below the cache.

    Args:
        named: the recipe's `tokenizer.source`.
        base: the base.
        experts: the experts.
        listings: of base and experts; their small files are here.
        cache: the hub's cache, which all workers see.

    Returns:
        The tokenizer, and what a user should know of it: a line each.

    Raises:
        InputError: what `choose` and `write_choice` raise.
    """
    owner = Owner(BASE, base.folder, base.config, _digest(listings["base"]))
    others = [
        Owner(f"experts.{name}", one.folder, None if one.is_adapter else one.config, _digest(listings[name]))
        for name, one in experts.items()
    ]
    generates = network_class(base.config, None, base.folder).can_generate()
    choice = choose(owner, others, named, getattr(base.config.get_text_config(), "vocab_size", 0), generates)
    folder = base.folder
    if choice.source is not owner or choice.added or choice.ends:
        folder = _write(choice, owner, others, cache)
    notes = [*choice.notes, *_code_notes(base.folder, folder), *_large_notes(base.folder)]
    return _tokenizer_in(folder, choice.token_ids()), notes


def tokenizer_by_name(named: str, folders: Mapping[str, Path]) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer, if there is any, of models that are merged by name: the base's, or the named one's.

    Args:
        named: the recipe's `tokenizer.source`.
        folders: of base and experts, by name.

    Returns:
        The tokenizer, and what a user should know of it: a line each.

    Raises:
        InputError: the named model has no tokenizer.
    """
    source = BASE if named == UNION else named
    if named != UNION and not has_tokenizer(folders[source]):
        raise InputError(f"tokenizer.source: {source} has no tokenizer in {folders[source]}; leave the key out")
    tokenizer = _tokenizer_in(folders[source], {})
    others = [name for name, one in folders.items() if has_tokenizer(one)]
    unlike = [name for name in others if _tokenizer_in(folders[name], {}).digest != tokenizer.digest]
    notes = [*_code_notes(folders[BASE], folders[source]), *_large_notes(folders[BASE])]
    if unlike:
        notes.append(
            f"tokenizer: merged models have the files of {source}; those of {', '.join(unlike)} differ, and are not "
            "compared where models are merged by name"
        )
    return tokenizer, notes


def _tokenizer_in(folder: Path, ids: Mapping[str, int | list[int]]) -> Tokenizer:
    files = {name: path for name, path in companions(folder).items() if is_tokenizer_file(name)}
    digests = {name: sha256_file(path) for name, path in files.items()}
    generation = folder / GENERATION_CONFIG
    stated = sha256_file(generation) if generation.is_file() else None
    return Tokenizer(folder, sha256_text(canonical(digests)), sha256_text(canonical([digests, stated, ids])), ids)


def _digest(listing: Listing) -> str:
    return sha256_text(canonical([[one.name, one.digest] for one in listing.files if is_tokenizer_file(one.name)]))


def _write(choice: Choice, base: Owner, experts: list[Owner], cache: Path) -> Path:
    """Write a tokenizer to a folder named by its content, unless it is there, and return the folder.

    Raises:
        InputError: the cache cannot be written.
    """
    tokenizers = cache / ".tokenizers"
    try:
        return _written(choice, base, experts, tokenizers)
    except OSError as error:
        raise InputError(
            f"--store: {tokenizers} cannot be written ({error.strerror}), which has to hold the tokenizer of merged "
            "models; choose another folder"
        ) from error


def _written(choice: Choice, base: Owner, experts: list[Owner], tokenizers: Path) -> Path:
    tokenizers.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=tokenizers, prefix=".") as temporary:
        folder = Path(temporary) / "written"
        folder.mkdir()
        write_choice(choice, base, experts, folder)
        target = tokenizers / sha256_text(canonical({n: sha256_file(p) for n, p in companions(folder).items()}))[:32]
        if not target.exists():
            folder.rename(target)
    return target


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
