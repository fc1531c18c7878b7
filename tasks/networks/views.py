"""Models in the vocabulary of merged models: which of their tensors have a row for every token, and how they get it."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from sensmerge.tasks.artifacts import load_object, write_json
from sensmerge.tasks.checkpoints.checkpoint import INDEX, Checkpoint
from sensmerge.tasks.checkpoints.companions import CONFIG, GENERATION_CONFIG, companions, copy_companions
from sensmerge.tasks.checkpoints.views import Gathered, Place, RowChange, VocabularyView, gather, stretches, write_view
from sensmerge.tasks.checkpoints.vocabulary import ModelRow, Vocabulary
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter import TRAINED_TOKENS, module_of, parameters_of, scaling_of, trained_tokens
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG, read_adapter_config
from sensmerge.tasks.networks.names import Names, names_of
from sensmerge.tasks.networks.networks import after_padding, load_config, skeleton

_IDS = re.compile(r".*_token_(id|ids|index)|(begin_)?suppress_tokens")
"""Keys of configs whose values are token ids."""


@dataclass(frozen=True)
class TokenTensor:
    """A tensor of a checkpoint that has a row for every token."""

    name: str
    key: str
    """of the parameter that it is, or is a factor of the change of"""
    axis: int
    """along which its rows lie"""
    is_change: bool = False
    """whether it is a factor of a change: a row that the model lacks is zero"""
    trained: tuple[int, ...] | None = None
    """rows of the parameter that it holds, in its order; None: all of them. The others are the base's"""


@dataclass(frozen=True)
class Member:
    """A model whose tokens are among those of merged models."""

    key: str
    """`base`, or the recipe key of an expert"""
    checkpoint: Checkpoint
    """its headers; nothing of its weights need be here"""
    config: PretrainedConfig | None
    """None of an adapter"""
    tensors: tuple[TokenTensor, ...]
    tied: Mapping[str, str]
    """see `Names`"""
    factors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """of an adapter: key of a parameter → factor (`A`, `B`, …) → its name"""

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.checkpoint.folder

    def stored(self, key: str) -> TokenTensor | None:
        """Return what holds the values of a parameter, under any name that is tied to it."""
        aliases = {key, self.tied.get(key, key), *(alias for alias, one in self.tied.items() if one == key)}
        found = [one for one in self.tensors if one.key in aliases and not one.is_change]
        return min(found, key=lambda one: one.key != key, default=None)

    def change(self, key: str) -> RowChange | None:
        """Return what an adapter adds to a parameter; None where it has no factors for it."""
        found = self.factors.get(key)
        if found is None:
            return None
        by_columns = "embedding_A" in found
        first, second = (found[f"embedding_{one}" if by_columns else one] for one in "AB")
        scaling = scaling_of(read_adapter_config(self.folder), module_of(first))
        return RowChange(self.key, self.checkpoint.tensors[first].file, first, second, scaling, by_columns)


def token_axes(config: PretrainedConfig, names: Names, folder: Path) -> dict[str, int]:
    """Return the axis along which parameters and buffers of a network have a row for every token, by key.

    They are those that have another shape in a network of one token more.
    """
    wider = copy.deepcopy(config)
    text = wider.get_text_config()
    if getattr(text, "vocab_size", None) is None:
        return {}
    text.vocab_size += 1
    shapes, more = (
        {name: tuple(tensor.shape) for name, tensor in skeleton(one, None, folder).state_dict().items()}
        for one in (config, wider)
    )
    return {
        names.key(name): next(axis for axis, size in enumerate(shape) if size != more[name][axis])
        for name, shape in shapes.items()
        if shape != more[name]
    }


def whole_member(key: str, checkpoint: Checkpoint, config: PretrainedConfig) -> Member:
    """Return a whole model."""
    names = names_of(skeleton(config, None, checkpoint.folder))
    axes = token_axes(config, names, checkpoint.folder)
    keys = {name: names.key(name) for name in checkpoint.tensors}
    tensors = tuple(TokenTensor(name, one, axes[one]) for name, one in keys.items() if one in axes)
    return Member(key, checkpoint, config, tensors, names.tied)


def adapter_member(key: str, checkpoint: Checkpoint, base: Member) -> Member:
    """Return an adapter of the base, of which only factors of changes may be there, or no such tensor at all."""
    assert base.config is not None
    names = names_of(skeleton(base.config, None, base.folder))
    axes = token_axes(base.config, names, base.folder)
    tensors = []
    factors: dict[str, dict[str, str]] = {}
    for name, (parameter, kind) in parameters_of(checkpoint, names).items():
        if parameter not in axes:
            continue
        if kind not in (None, "trained_tokens"):
            factors.setdefault(parameter, {})[str(kind)] = name
        if kind == "trained_tokens":
            trained = trained_tokens(checkpoint.folder, name)
            if len(trained) == checkpoint.tensors[name].shape[0]:
                tensors.append(TokenTensor(name, parameter, axes[parameter], trained=trained))
        elif kind == "B" or (kind is None and _fits(checkpoint, name, base, parameter, axes[parameter])):
            tensors.append(TokenTensor(name, parameter, axes[parameter], is_change=kind is not None))
        elif kind == "embedding_A":
            tensors.append(TokenTensor(name, parameter, 1, is_change=True))
    return Member(key, checkpoint, None, tuple(tensors), names.tied, factors)


def _fits(checkpoint: Checkpoint, name: str, base: Member, key: str, axis: int) -> bool:
    """Return whether a tensor is a parameter of the base but for the number of its rows; what is not, is refused."""
    found, whole = checkpoint.tensors[name].shape, base.stored(key)
    expected = base.checkpoint.tensors[whole.name].shape if whole else ()
    others = [[size for place, size in enumerate(shape) if place != axis] for shape in (found, expected)]
    return len(found) == len(expected) and others[0] == others[1] and found[axis] > 0


def view_of(member: Member, vocabulary: Vocabulary, members: Sequence[Member]) -> VocabularyView:
    """Return a model in the vocabulary of merged models, in which folders have the names of their models.

    Args:
        member: the model.
        vocabulary: of merged models.
        members: all models, the base first.

    Raises:
        InputError: a model lacks a tensor that rows are to be taken from.
    """
    sources, own = vocabulary.rows_of(member.key), vocabulary.own_rows(member.key)
    tensors: dict[str, Gathered] = {}
    left_out = []
    for one in member.tensors:
        info, name = member.checkpoint.tensors[one.name], one.name
        shape, dtype = info.shape, info.dtype
        if one.trained is not None:
            whole = members[0].stored(one.key)
            assert whole is not None, "the base has what its network has"
            of_base = members[0].checkpoint.tensors[whole.name]
            shape, dtype = of_base.shape, dtype if dtype == of_base.dtype else "F32"
            left_out.append(name)
            name = name.replace(TRAINED_TOKENS, ".weight")
        shape = tuple(vocabulary.rows if axis == one.axis else size for axis, size in enumerate(shape))
        like = Gathered(one.axis, dtype, shape, info.file, ())
        found = _Rows(member, one, {other.key: other for other in members}, members[0])
        tensors[name] = gather(like, own if one.is_change else sources, found.place)
    places = {to: start for start, to in vocabulary.places(member.key).items()}
    return VocabularyView(tensors, tuple(left_out), stretches(places))


@dataclass(frozen=True)
class _Rows:
    """Where the rows are stored that one tensor of a model is made of."""

    member: Member
    tensor: TokenTensor
    members: Mapping[str, Member]
    base: Member

    def place(self, row: ModelRow) -> Place:
        """Return where a row is stored; raises InputError if its model has no such tensor."""
        owner, base = self.members[row.model], self.base
        stored = self._stored[row.model]
        if stored is None and owner.config is None:  # an adapter has the base's, but for what it adds
            found = self.place(ModelRow(base.key, row.number))
        elif stored is None:
            raise InputError(
                f"{owner.key} has no tensor like {self.tensor.name} of {self.member.key}, which lacks tokens that "
                f"{owner.key} has; name another model for them in tokenizer.tokens"
            )
        elif stored.trained is not None and row.number not in stored.trained:
            return self.place(ModelRow(base.key, row.number))
        else:
            number = row.number if stored.trained is None else stored.trained.index(row.number)
            file = owner.checkpoint.tensors[stored.name].file
            found = Place(owner.key, file, stored.name, number)
        if owner is self.member:  # whose factors are tensors of their own
            return found
        if owner.factors and owner.key not in self._changes:
            self._changes[owner.key] = owner.change(self.tensor.key if stored is None else stored.key)
        return found._replace(change=self._changes.get(owner.key))

    @cached_property
    def _stored(self) -> dict[str, TokenTensor | None]:
        others = {key: one.stored(self.tensor.key) for key, one in self.members.items()}
        return {**others, self.member.key: self.tensor}

    @cached_property
    def _changes(self) -> dict[str, RowChange | None]:
        """What adapters add to rows that they lend, by their keys."""
        return {}


def donors(view: VocabularyView, key: str) -> list[str]:
    """Return the keys of the other models that a view (of `view_of`) takes rows from."""
    parts = [one for how in view.tensors.values() for one in (*how.parts, *sum(how.means.values(), ()))]
    folders = {one.folder for one in parts} | {one.change.folder for one in parts if one.change is not None}
    return sorted(folders - {key})


def fill_folder(member: Member, view: VocabularyView, rows: int, target: Path) -> None:
    """Write a folder that stands for a model in the vocabulary of merged models.

    Args:
        member: the model.
        view: of it.
        rows: of merged models' embeddings.
        target: the folder, which is there and empty.

    Raises:
        InputError: the network's size of vocabulary cannot be set, or its positions depend on a token that moves.
    """
    copy_companions(companions(member.folder), target)
    moved = view.moved()
    if member.config is None:
        trains = any(one.trained is not None for one in member.tensors)
        settings = load_object(member.folder / ADAPTER_CONFIG)
        if trains and len({member.tied.get(one.key, one.key) for one in member.tensors}) == 1:
            # peft changes what is tied to an embedding along with it.
            settings["ensure_weight_tying"] = bool(member.tied)
        write_json(target / ADAPTER_CONFIG, {**settings, **({"trainable_token_indices": None} if trains else {})})
    if (member.folder / GENERATION_CONFIG).is_file():
        write_json(target / GENERATION_CONFIG, _with_moved(load_object(member.folder / GENERATION_CONFIG), moved))
    if member.config is not None:
        write_json(target / CONFIG, _moved_config(member, member.config, moved, rows))
        found = getattr(load_config(target).get_text_config(), "vocab_size", None)
        if found != rows:
            raise InputError(
                f"{member.key}: {member.folder / CONFIG}: {member.config.model_type} has no size of vocabulary that "
                "could be changed; use experts with the base's tokens"
            )
    link_weights(member.checkpoint, target)
    write_view(view, target)


def link_weights(checkpoint: Checkpoint, target: Path) -> None:
    """Link the files of a checkpoint, which need not be here yet, into a folder that stands for its model."""
    for file in {info.file for info in checkpoint.tensors.values()} | {INDEX}:
        path = checkpoint.folder / file
        if file != INDEX or path.is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).symlink_to(path.absolute())


def _moved_config(member: Member, config: PretrainedConfig, moved: Mapping[int, int], rows: int) -> dict[str, Any]:
    """Return a model's `config.json` with the size and the token ids of merged models."""
    written = load_object(member.folder / CONFIG)
    text = config.get_text_config()
    inner = {name: getattr(config, name, None) for name in type(config).sub_configs}
    for name, part in {"": config, **inner}.items():
        if not isinstance(part, PretrainedConfig):
            continue
        values = part.to_dict()
        changed = {key: one for key, one in _with_moved(values, moved).items() if one != values[key]}
        changed |= {"vocab_size": rows} if part is text else {}
        if not name:
            written |= changed
        elif changed:
            written[name] = {**(written.get(name) or {}), **changed}
    padding = getattr(text, "pad_token_id", None)
    if after_padding(config) and padding is not None and moved.get(padding) != padding:
        raise InputError(
            f"{member.key}: {config.model_type} numbers positions from behind its padding token, which merged models "
            "number differently; name it as tokenizer.source"
        )
    return written


def _with_moved(values: Mapping[str, Any], moved: Mapping[int, int]) -> dict[str, Any]:
    """Return settings with the token ids of merged models; an id without a token there is left out."""
    found = dict(values)
    for key, value in values.items():
        if not _IDS.fullmatch(key):
            continue
        if isinstance(value, list):
            found[key] = [moved[one] for one in value if one in moved]
        elif isinstance(value, int) and value >= 0:
            found[key] = moved.get(value)
    return found
