"""Transformers networks: their structure without weights, and networks filled with the weights of any model."""

import copy
import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from sensmerge.tasks.artifacts import canonical, load_object, sha256_text
from sensmerge.tasks.checkpoints.companions import CONFIG, TOKENIZER_CONFIG, has_tokenizer
from sensmerge.tasks.checkpoints.quantised import WAY_OUT, quantisation
from sensmerge.tasks.checkpoints.views import read_view
from sensmerge.tasks.errors import InputError, shown
from sensmerge.tasks.networks.bounds import ERRORS, check_bounds, setting
from sensmerge.tasks.networks.foreign import check_foreign
from sensmerge.tasks.networks.merged_ids import in_merged_ids
from sensmerge.tasks.networks.pictures import PIXELS
from sensmerge.tasks.networks.zero_shot import CLIPZeroShotClassifier

_AFTER_PADDING = re.compile(r"roberta|camembert|data2vec-text|longformer|mpnet|^esm$|ibert")

Head = str
"""What a network ends in: `causal_lm`, `seq2seq_lm`, `classification` (of a single class: a number),
`token_classification`, or `trunk`: no head follows."""

_OURS: dict[type[PretrainedConfig], type[PreTrainedModel]] = {CLIPVisionConfig: CLIPZeroShotClassifier}
"""Classifiers that transformers lacks, by config."""
_AUTO_MAPPINGS = {
    "causal_lm": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    "seq2seq_lm": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,),
    "trunk": (modeling_auto.MODEL_MAPPING,),
    "classification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        _OURS,
    ),
    "token_classification": (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,),
}
"""Networks by head and config; a language model that also reads images counts where there is none of texts alone, and a
classifier of pictures where there is none of texts."""


def load_config(folder: Path, dequantize: bool = False) -> PretrainedConfig:
    """Read a model's `config.json`. Code that comes with a model is never run.

    Args:
        folder: the model's.
        dequantize: whether it may say that weights are quantised, since they are not when they are used.

    Raises:
        InputError: no or invalid config, an architecture that transformers does not know, quantised weights, or what
            would have transformers fetch or run something from elsewhere.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a Hugging Face model folder")
    content = load_object(path)
    check_foreign(path)
    names = content.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f'{path}: architectures is {shown(names)}; expected a list such as ["LlamaForCausalLM"]')
    try:
        with _quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*ERRORS, StrictDataclassError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not the config of a model that transformers has; code of a model is never run ({reason})"
        ) from error
    check_bounds(config, path)
    quantised = quantisation(content)
    if quantised and not dequantize:
        raise InputError(
            f"{path}: the weights are quantised ({quantised}); expected float weights without that key: {WAY_OUT}"
        )
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of transformers: what is wrong with a model is said here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def network_class(config: PretrainedConfig, head: Head | None, folder: Path) -> type[PreTrainedModel]:
    """Return the transformers class for a config: the one that ends in `head`, or the checkpoint's own if None.

    Raises:
        InputError: transformers has no such class for this architecture.
    """
    if head is not None:
        texts, *others = _AUTO_MAPPINGS[head]
        if type(config) not in texts and head == "causal_lm":
            # Text towers of some models have a language model of their own without being listed.
            names = set(config.architectures or ()) & set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
            for tower in (getattr(transformers, name) for name in sorted(names)):
                if tower.config_class is type(config):
                    return tower  # type: ignore[no-any-return]
        for mapping in (texts, *others):
            if type(config) in mapping:
                return mapping[type(config)]  # type: ignore[no-any-return]
        raise InputError(f"{folder}: transformers has no {head} network for model_type {config.model_type!r}")
    mappings = [mapping for several in _AUTO_MAPPINGS.values() for mapping in several]
    listed = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    ours = {one.__name__: one for one in _OURS.values()}
    for name in config.architectures or ():
        own: Any = ours.get(name) or getattr(transformers, name, None)
        if (isinstance(own, type) and getattr(own, "config_class", None) is type(config)) or own in listed:
            return own  # type: ignore[no-any-return]
    raise InputError(
        f"{folder / CONFIG}: architectures = {config.architectures!r} names no network that transformers has "
        f'for model_type {config.model_type!r}; expected one such as ["LlamaForCausalLM"]'
    )


def has_network(config: PretrainedConfig, head: Head) -> bool:
    """Return whether transformers has a network that ends in `head` for a config."""
    return any(type(config) in mapping for mapping in _AUTO_MAPPINGS[head])


def own_ending(names: Collection[str]) -> Head:
    """Return in which of `OWN_HEADS` a network ends, by the names of classes that may be its own."""
    tags = modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()
    return "classification" if set(names).isdisjoint(tags) else "token_classification"


def reads_images(config: PretrainedConfig) -> bool:
    """Return whether the language model for a config is one that also reads images, and may read nothing without."""
    texts, images = _AUTO_MAPPINGS["causal_lm"]
    return type(config) in images and type(config) not in texts


def untied_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config that ties no parameters, in no part of the network."""
    untied = copy.deepcopy(config)
    for part in {id(one): one for one in (untied, untied.get_text_config())}.values():
        part.tie_word_embeddings = False
    return untied


def skeleton(config: PretrainedConfig, head: Head | None, folder: Path) -> PreTrainedModel:
    """Return the network on the meta device: modules, parameter names and shapes, no memory.

    Raises:
        InputError: transformers has no such class, or cannot build a network of these settings.
    """
    cls = network_class(config, head, folder)
    try:
        with torch.device("meta"):
            return cls(config_of(cls, config))
    except ERRORS as error:
        raise InputError(
            f"{folder / CONFIG}: no {cls.__name__} can be built of its settings ({error!r}); get the file again"
        ) from error


def config_of(cls: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that a class of networks takes: of its text where the class is a text tower's."""
    text = config.get_text_config()
    return text if cls.config_class is type(text) else config


def hollow_network(config: PretrainedConfig, head: Head, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """Return the network in evaluation mode with its parameters on the meta device and all buffers that it computes.

    Tied parameters are one; nothing is cached for generation.

    Raises:
        InputError: transformers has no such class for this architecture.
    """
    cls = network_class(config, head, folder)
    with init_empty_weights():
        network: PreTrainedModel = cls._from_config(copy.deepcopy(config_of(cls, config)), dtype=dtype)
    network.tie_weights()  # each was registered on the meta device again
    _take_any_float(network)
    return for_one_pass(network)


def for_one_pass(network: PreTrainedModel) -> PreTrainedModel:
    """Return a network in evaluation mode that caches nothing for generation and adds nothing to the loss of a sample.

    What routers of mixtures add (`output_router_logits`) depends on all blocks at once, so a network in parts has none.
    """
    configs = [network.config, network.config.get_text_config()]
    if is_seq2seq(network):
        configs.append(network.get_decoder().config)  # T5's has a copy of its own
    for config in configs:
        config.use_cache = False
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
    return network.eval()


def trunk_name(network: PreTrainedModel) -> str:
    """Return what a network calls its trunk, or would call it if it were not the trunk itself.

    Some classifiers of pictures (CLIP's, SigLIP's) have it under another name than `base_model_prefix`.
    """
    prefix: str = network.base_model_prefix
    if hasattr(network, prefix) or type(network) not in _AUTO_MAPPINGS["classification"][1].values():
        return prefix
    trunk = trunk_of(network)
    return next(str(name) for name, module in network.named_children() if module is trunk)


def trunk_or_self(network: PreTrainedModel) -> nn.Module:
    """Return the trunk of a network, which is the network itself if nothing follows it."""
    found: nn.Module = getattr(network, trunk_name(network), network)
    return found


def trunk_of(network: PreTrainedModel) -> nn.Module:
    """Return what gives the hidden states that the head of a network takes."""
    trunk: nn.Module = network.base_model
    if trunk is not network:
        return trunk
    # Some give their trunk another name than `base_model_prefix` says.
    return max(network.children(), key=lambda child: sum(one.numel() for one in child.parameters()))


def is_seq2seq(network: PreTrainedModel) -> bool:
    """Return whether a network writes, by its decoder, what its encoder is asked: one that ends in `seq2seq_lm`."""
    return bool(network.config.is_encoder_decoder) and network.can_generate()


def run_trunk(network: PreTrainedModel, **inputs: Any) -> Any:
    """Return what the trunk of a network hands to its head; of an encoder-decoder that writes, what its decoder gives.

    That one's inputs are those of the whole network, labels included: by these the network itself makes the decoder's.
    """
    if not is_seq2seq(network):
        return trunk_of(network)(**inputs)
    found: list[Any] = []

    def keep(module: nn.Module, args: object, output: Any) -> None:
        found.append(output)
        raise _DecoderRan

    handle = network.get_decoder().register_forward_hook(keep)
    try:
        with suppress(_DecoderRan):
            network(**inputs)
    finally:
        handle.remove()
    return found[0] if found else None


class _DecoderRan(Exception):
    """The network need not run on."""


def fill_network(
    config: PretrainedConfig,
    head: Head | None,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: str,
    folder: Path,
) -> PreTrainedModel:
    """Return a network in evaluation mode with the given weights, by any name that transformers knows them by.

    Raises:
        InputError: the weights leave a parameter of the network without a value of its shape.
    """
    cls = network_class(config, head, folder)
    pools = head == "trunk" and "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    transformers.logging.disable_progress_bar()
    with _quiet():
        network, loaded = cls.from_pretrained(
            None,
            config=config_of(cls, config),
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({"add_pooling_layer": False} if pools else {}),  # nothing reads it, and many files lack it
        )
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        names = sorted([*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])])
        raise InputError(f"{folder}: no fitting weights for {', '.join(names[:5])} of {cls.__name__}")
    network.to(device)
    network.eval()
    filled: PreTrainedModel = network
    _take_any_float(filled)
    return filled


def _take_any_float(network: PreTrainedModel) -> None:
    """Have a network take pixels in any dtype, as most do by themselves: convolutions take none but their own."""
    for module in {network, trunk_or_self(network)} if network.main_input_name == PIXELS else ():
        module.register_forward_pre_hook(partial(_cast, network), with_kwargs=True)


def _cast(
    network: PreTrainedModel, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        is_pixels = isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()
        return value.to(network.dtype) if is_pixels else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def after_padding(config: PretrainedConfig) -> bool:
    """Return whether a network numbers positions from behind its padding token, as RoBERTa and its kin do."""
    return bool(_AFTER_PADDING.search(config.model_type))


def positions(config: PretrainedConfig) -> int | None:
    """Return how many tokens a network takes at most; None where its positions have no table or stated limit."""
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    offset = text.pad_token_id + 1 if limit and after_padding(text) else 0
    return limit - offset if limit and limit > 0 else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: there is none, it needs code of its own, or its files name others elsewhere.

    Returns:
        Of a folder that stands for a model in the vocabulary of merged models, one that gives their ids.
    """
    for name in (CONFIG, TOKENIZER_CONFIG):
        if (folder / name).is_file():
            check_foreign(folder / name)
    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a", verbose=False)  # settings of wrong types are found by those who use them
        # Of many kinds transformers makes one of no files at all, to which every word is unknown.
        files = sorted(set(tokenizer.vocab_files_names.values()))
        if files and not has_tokenizer(folder) and not any((folder / name).is_file() for name in files):
            raise ValueError(f"there is no {' or '.join(files)}")
    except Exception as error:  # the tokenizers library raises nothing narrower for a file that it cannot read
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: no usable tokenizer ({reason}); get its files again") from error
    view = read_view(folder)
    return tokenizer if view is None else in_merged_ids(tokenizer, view.moved(), folder, load_tokenizer(view.writer))


def describe(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings that a base and its experts must share for their weights to be added."""
    text = config.get_text_config()
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
    return {key: setting(text, key) for key in (*keys, "num_key_value_heads")}


def computation_digest(config: PretrainedConfig) -> str:
    """Return a digest of what a config says of the computation: all but classes and where it comes from."""
    about = {"id2label", "label2id", "problem_type", "architectures", "transformers_version", "_name_or_path"}
    settings = json.loads(config.to_json_string(use_diff=False))
    return sha256_text(canonical({key: value for key, value in settings.items() if key not in about}))


def finite(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is. Raises InputError if it holds NaN or infinity."""
    if not tensor.isfinite().all():
        raise InputError("the model gives NaN or infinite logits; merge with a smaller weight or a wider dtype")
    return tensor
