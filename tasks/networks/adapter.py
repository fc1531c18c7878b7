"""PEFT LoRA adapters: which tensors their factors belong to, scaled exactly as peft scales them."""

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.artifacts import load_object
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint
from sensmerge.tasks.checkpoints.weights import BaseWeights, LoraFactors, Piece, View
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG, AdapterConfig
from sensmerge.tasks.networks.bounds import ERRORS
from sensmerge.tasks.networks.names import Names, plain
from sensmerge.tasks.networks.regions import regions

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer.weight"
TRAINED_TOKENS = ".token_adapter.trainable_tokens_delta"
"""Ends the name of some rows of an embedding: their values, whatever the name says."""
_ADAPTER_NAME = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B))\.(?!weight$)[\w-]+(?=\.weight$|$)")
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[\w-]+\.")
_ORIGINAL_MODULE = ".original_module."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, matched with its base."""

    low_rank: Mapping[str, LoraFactors]
    """base's name of each adapted tensor → its task vector"""
    pieces: Mapping[str, tuple[Piece, ...]]
    """base's name → task vectors of its parts, where the base holds stacked what was adapted one by one"""
    saved: Mapping[str, str]
    """name of each parameter stored whole (modules_to_save, changed base layers) → its name in the adapter"""
    unties: bool
    """whether it changes one of two tied parameters, or each in its own way; then nothing else is told"""


def parse_adapter(
    checkpoint: Checkpoint,
    config: AdapterConfig,
    network: PreTrainedModel,
    names: Names,
    base: BaseWeights,
    weights: Mapping[str, str],
) -> Adapter:
    """Match an adapter's tensors with the parameters of the network it was trained on, and with the base's tensors.

    Args:
        checkpoint: the adapter's headers.
        config: as `read_adapter_config` returns it.
        network: the network on the meta device; module types and shapes are read from it.
        names: of the network.
        base: the base.
        weights: name of each of its weights by key.

    Raises:
        InputError: a tensor that belongs to no module of the network or does not fit it: another base's adapter; one
            that lacks tensors which its config asks for.
        FilesNeeded: tensors must be compared whose files are not here yet.
    """
    return _Match(checkpoint, config, network, names, base, weights).adapter()


@dataclass(frozen=True)
class _Match:
    """An adapter beside the network and the base that it belongs to; see `parse_adapter`."""

    checkpoint: Checkpoint
    config: AdapterConfig
    network: PreTrainedModel
    names: Names
    base: BaseWeights
    weights: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The adapter's file, for messages."""
        return self.checkpoint.folder / ADAPTER_WEIGHTS

    def adapter(self) -> Adapter:
        """Match all tensors."""
        names = self.names
        modules = {_key(name, names): module for name, module in self.network.named_modules()}
        stored = self._stored()
        pairs, saved = self._split(stored)
        found = {module: _module_key(_key(module, names), modules, names) for module in pairs}
        if all(key == _key(module, names) and key in modules for module, key in found.items()):
            _check_whole(self.path, set(stored), self.config, self.network, names)
        tied = {*names.tied, *names.tied.values()}
        # peft may store embedding and head as they are, without having been told to train them.
        saved = {
            parameter: name
            for parameter, name in saved.items()
            if names.key(parameter) not in tied or self._changes_base(name, names.key(parameter))
        }
        changed = {names.key(f"{module}.weight") for module in pairs} | {names.key(parameter) for parameter in saved}
        if not self.config.ensure_weight_tying and changed & tied:
            return Adapter({}, {}, {}, unties=True)
        saved = {parameter: name for parameter, name in saved.items() if names.key(parameter) not in names.tied}
        low_rank: dict[str, LoraFactors] = {}
        pieces: dict[str, tuple[Piece, ...]] = {}
        views = cache(partial(regions, self.network, names))
        for module, pair in pairs.items():
            key = found[module]
            if f"{key}.weight" in names.tied:
                continue
            target = self.weights.get(f"{key}.weight")
            if target is not None:
                low_rank[target] = self._low_rank(module, modules.get(key), self.base.info(target).shape, pair)
                continue
            stacked, view = self._stacked_weight(f"{key}.weight", module, views)
            factors = self._low_rank(module, None, view.shape, pair)
            pieces[stacked] = (*pieces.get(stacked, ()), Piece(factors, inside=view))
        return Adapter(low_rank, pieces, saved, unties=False)

    def _stored(self) -> dict[str, str]:
        """Return the adapter's names of its tensors, by what `_peft_name` returns.

        Raises:
            InputError: two adapters are in the file, or a name is none that peft gives.
        """
        stored: dict[str, str] = {}
        for name in self.checkpoint.tensors:
            # Whole dumps hold what was trained and the module as it was before.
            if _ORIGINAL_MODULE in name:
                continue
            stripped = _peft_name(name, self.path)
            if stored.setdefault(stripped, name) != name:
                raise InputError(
                    f"{self.path}: {stored[stripped]} and {name} belong to two adapters; save one alone with "
                    "peft's save_pretrained(selected_adapters=[NAME])"
                )
        return stored

    def _split(self, stored: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Split an adapter's tensors.

        Returns:
            Of every adapted module its factors' names; and of every parameter that is stored whole its name.

        Raises:
            InputError: a tensor that is neither.
        """
        pairs: dict[str, dict[str, str]] = {}
        saved: dict[str, str] = {}
        names, modules_to_save = self.names, self.config.modules_to_save or ()
        for stripped, name in stored.items():
            module, kind = _split_lora_name(stripped)
            if kind is not None:
                pairs.setdefault(module, {})[kind] = name
            elif stripped.endswith(_BASE_LAYER):
                parameter = f"{stripped.removesuffix(_BASE_LAYER)}.weight"
                if self._changes_base(name, names.key(parameter)):
                    saved[parameter] = name
            elif names.parameter(stripped) in names.parameters or _is_saved(stripped, modules_to_save):
                saved[stripped] = name
            else:
                raise InputError(
                    f"{self.path}: tensor {name} is neither a LoRA factor nor a parameter of {names.network}; it "
                    "cannot be handled: merge the adapter into its base with peft first"
                )
        return pairs, saved

    def _changes_base(self, name: str, key: str) -> bool:
        """Return whether peft's copy of a layer that it adapts is another than the base's."""
        checkpoint, base = self.checkpoint, self.base
        match = self.weights.get(self.names.tied.get(key, key))
        if match is None or checkpoint.tensors[name].shape != base.info(match).shape:
            return True
        checkpoint.require(name)
        base.checkpoint.require(base.stored_name(match))
        return not torch.equal(checkpoint.read(name).to(base.dtype(match)), base.read(match))

    def _stacked_weight(
        self, key: str, module: str, views: Callable[[str], dict[str, View] | None]
    ) -> tuple[str, View]:
        """Return the base's tensor that holds the weight of an adapted module stacked with others, and where in it.

        Raises:
            InputError: there is none.
        """
        names, weights = self.names, self.weights
        parameter = names.parameter(key)
        found = views(parameter) if parameter in names.parameters else None
        if found is None or key not in found or parameter not in weights:
            if any(parameter in names.all_parameters(name) for name in weights.values()):
                raise InputError(
                    f"{self.path}: adapts {module}, whose weight the base's files hold in another form than "
                    f"{names.network}; merge the adapter into its base with peft first"
                )
            raise InputError(
                f"{self.path}: adapts {module}, which the base does not have; the adapter was made for another base"
            )
        return weights[parameter], found[key]

    def _low_rank(
        self, name: str, module: nn.Module | None, shape: tuple[int, ...], pair: Mapping[str, str]
    ) -> LoraFactors:
        """Return the task vector of an adapted module's weight.

        Args:
            name: of the module.
            module: hollow; None for a linear layer that the network holds stacked with others.
            shape: of the weight.
            pair: factor → name of its tensor.

        Raises:
            InputError: another kind of module; a factor is missing, or has another shape.
        """
        path, tensors, config = self.path, self.checkpoint.tensors, self.config
        embedding = isinstance(module, nn.Embedding)
        if not (module is None or embedding or isinstance(module, nn.Linear | Conv1D)):
            raise InputError(
                f"{path}: adapts {name}, a {type(module).__name__}; only linear layers and embeddings are handled"
            )
        try:
            first, second = (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
        except KeyError as missing:
            raise InputError(f"{path}: {name} has no factor {missing}; save the whole adapter again") from missing
        rank = config.rank(name)
        transpose = embedding or isinstance(module, Conv1D)
        rows, columns = reversed(shape) if transpose else shape
        found, expected = (tensors[first].shape, tensors[second].shape), ((rank, columns), (rows, rank))
        if found != expected:
            raise InputError(
                f"{path}: the factors of {name} have shapes {found[0]} and {found[1]}, expected {expected[0]} and "
                f"{expected[1]} for the base's weight and the rank of {ADAPTER_CONFIG}; it was made for another base"
            )
        return LoraFactors(first, second, scaling_of(config, name), transpose)


def scaling_of(config: AdapterConfig, module: str) -> float:
    """Return what the product of a module's factors is multiplied by."""
    rank, alpha = config.rank(module), config.alpha(module)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank  # peft: LoraLayer.update_layer


def module_of(name: str) -> str:
    """Return the module that a factor of an adapter belongs to, by the factor's name in the file."""
    return _split_lora_name(_peft_name(name, Path(ADAPTER_WEIGHTS)))[0]


def parameters_of(checkpoint: Checkpoint, names: Names) -> dict[str, tuple[str, str | None]]:
    """Return, by the name of each tensor of an adapter, the key of the parameter that it changes or stands for.

    With it stands which factor of the change it is (`A`, `B`, `embedding_A`, `embedding_B`), `trained_tokens` for some
    rows of values, or None for all values.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for name in checkpoint.tensors:
        if _ORIGINAL_MODULE in name:
            continue
        stripped = _peft_name(name, checkpoint.folder / ADAPTER_WEIGHTS)
        module, kind = _split_lora_name(stripped)
        if stripped.endswith(TRAINED_TOKENS):
            module, kind = stripped.removesuffix(TRAINED_TOKENS), "trained_tokens"
        parameter = f"{module}.weight" if kind else stripped.replace(_BASE_LAYER, ".weight")
        found[name] = names.key(parameter), kind
    return found


def trained_tokens(folder: Path, tensor: str) -> tuple[int, ...]:
    """Return the rows of an embedding that an adapter trains (`trainable_token_indices`), in the order of its tensor.

    Raises:
        InputError: the adapter's config does not say them, or not as peft writes them.
    """
    path = folder / ADAPTER_CONFIG
    stated = load_object(path).get("trainable_token_indices")
    module = tensor.removesuffix(TRAINED_TOKENS)
    if isinstance(stated, dict):
        stated = next((one for key, one in stated.items() if f".{module}".endswith(f".{key}")), None)
    if not isinstance(stated, list) or not all(isinstance(one, int) and one >= 0 for one in stated):
        raise InputError(f"{path}: trainable_token_indices does not say which rows {tensor} holds; save it again")
    return tuple(stated)


def _peft_name(name: str, path: Path) -> str:
    """Return a stored name without what peft, torch.compile and data parallelism put there.

    Raises:
        InputError: it is no name that peft gives.
    """
    found = plain(name)
    if not found.startswith(_PREFIX):
        raise InputError(f"{path}: tensor {name} does not start with {_PREFIX}; expected a PEFT adapter")
    # The adapter's own name and wrapper, which peft leaves out when it saves.
    return _SAVED_MODULE.sub(".", _ADAPTER_NAME.sub(r"\1", plain(found.removeprefix(_PREFIX))))


def _module_key(key: str, modules: Mapping[str, nn.Module], names: Names) -> str:
    """Return the key of a module that an adapter names, which may have been trained in another wrapper of the network.

    The base may be the language model inside the network that was adapted, or the other way round.
    """
    if key in modules:
        return key
    if names.tower and names.tower + key in modules:
        return names.tower + key
    for wrapper in ("language_model.", "text_model."):
        _, found, inner = key.partition(wrapper)
        if found and inner in modules:
            return inner
    return key


def _check_whole(path: Path, stored: set[str], config: AdapterConfig, network: PreTrainedModel, names: Names) -> None:
    """Check that an adapter has all tensors, and no other factors, that peft makes of its config for the network.

    Args:
        path: of the adapter.
        stored: its tensors, as `_peft_name` returns them.
        config: its config.
        network: the network on the meta device.
        names: of the network.

    Raises:
        InputError: a tensor is missing, or is one that peft would not load; peft finds nothing in the network that the
            config names; what `AdapterConfig.naming` raises.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    naming = config.naming([name for name, _ in network.named_modules()])
    try:
        settings = LoraConfig(**naming, r=1, init_lora_weights=False)  # which rank is no matter here
        with warnings.catch_warnings():  # peft asks transformers by names that will be gone in another version
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(copy.deepcopy(network), settings, low_cpu_mem_usage=True)
    except ERRORS as error:
        raise InputError(
            f"{config.path}: peft cannot apply it to {type(network).__name__} "
            f"({' '.join(str(error).split())}); expected the config of an adapter of that network"
        ) from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {_factor(_peft_name(name, path), names): name for name in expected}
    found = {_factor(name, names): name for name in stored}
    more = [name for factor, name in found.items() if factor[1] is not None and factor not in wanted]
    if more:
        raise InputError(
            f"{path}: holds {more[0]}{f' and {len(more) - 1} more' if more[1:] else ''}, which peft ignores because "
            f"its config does not name it; add the module to target_modules in {ADAPTER_CONFIG}, or remove the tensors"
        )
    lacking = [name for factor, name in wanted.items() if factor not in found]
    if lacking:
        raise InputError(
            f"{path}: has no tensor {lacking[0]}, which its config asks for ({len(wanted) - len(lacking)} of "
            f"{len(wanted)} are there); save the whole adapter again (with ZeRO-3, gather the weights first)"
        )


def _key(module: str, names: Names) -> str:
    """Return the key of a module, by that of its weight: transformers' patterns are made for whole names."""
    return names.key(f"{module}.weight").removesuffix(".weight")


def _factor(name: str, names: Names) -> tuple[str, str | None]:
    module, kind = _split_lora_name(name)
    return _key(module, names), kind


def _is_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """Return whether a tensor is in one of the modules: peft compares the ends of module names."""
    parts = name.split(".")
    modules = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(module.endswith(saved) for module in modules for saved in modules_to_save)


def _split_lora_name(name: str) -> tuple[str, str | None]:
    """Split `a.b.lora_A.weight` into module `a.b` and factor `A`; the factor is None where the tensor is none."""
    for suffix, kind in (
        (".lora_A.weight", "A"),
        (".lora_B.weight", "B"),
        (".lora_embedding_A", "embedding_A"),
        (".lora_embedding_B", "embedding_B"),
    ):
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    return name, None
