"""Whether the kind of each task has a meaning for the network of its expert."""

from collections.abc import Mapping
from typing import NamedTuple

from transformers.models.auto import modeling_auto

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import Task
from sensmerge.tasks.networks.base import missing_parameters
from sensmerge.tasks.networks.causality import not_causal
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import Head, has_network
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.networks.zero_shot import CLIPZeroShotClassifier

ZERO_SHOT = {"clip_vision_model": CLIPZeroShotClassifier.__name__}
"""Networks that end in a head which is made for them."""


class _Ending(NamedTuple):
    """What networks end in that have a head of their own."""

    name: str
    with_type: str
    """what their adapters say beside the head that they have"""
    networks: Mapping[str, str]
    """names of their classes"""


_TOWERS = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
_OWN_ENDINGS: Mapping[tuple[Head, Reads], _Ending] = {
    ("classification", "texts"): _Ending(
        "a classifier of texts", "task_type SEQ_CLS and ", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    ("classification", "pictures"): _Ending(
        "a classifier of pictures",
        "",
        {**modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, **ZERO_SHOT},
    ),
    ("token_classification", "texts"): _Ending(
        "a classifier of tokens", "task_type TOKEN_CLS and ", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    ),
}


def check_kinds(tasks: Mapping[str, Task], experts: Mapping[str, Expert]) -> None:
    """Check that the kind of each task has a meaning for the network of its expert.

    Raises:
        InputError: it has none, or a package is not installed; it names the recipe's key and a way out.
    """
    for name, task in tasks.items():
        expert = experts[name]
        if task.head == "trunk":
            _check_embeds(f"tasks.{name}.kind: {task.kind} needs an encoder without a head", expert)
        elif task.head == "seq2seq_lm":
            _check_writes(f"tasks.{name}.kind: {task.kind} needs an encoder-decoder that writes", expert)
        elif not task.has_own_head:
            _check_continues(f"tasks.{name}.kind: {task.kind} needs a language model", expert)
        else:
            _check_ending(f"tasks.{name}.kind: {task.kind}", _OWN_ENDINGS[task.head, task.reads], expert)
            task.check_config(expert.config, f"tasks.{name}")
        task.check_installed(f"tasks.{name}")


def _check_continues(needs: str, expert: Expert) -> None:
    ways_out = "leave the task out, or use kind classification if the experts are classifiers"
    if has_network(expert.base.config, "seq2seq_lm") and expert.base.config.is_encoder_decoder:
        ways_out = "leave the task out, or use kind seq2seq"
    for folder, config in ((expert.base.folder, expert.base.config), (expert.folder, expert.config)):
        reason = not_causal(config)
        if reason:
            raise InputError(f"{needs}, but {folder} ({config.model_type}) {reason}; {ways_out}")
    try:
        lacking = missing_parameters(expert.base, "causal_lm")
    except InputError as error:
        raise InputError(f"{needs}; {error}; {ways_out}") from None
    if lacking:
        raise InputError(f"{needs}, but the base lacks {lacking[0]}; expected a base with a language-model head")


def _check_embeds(needs: str, expert: Expert) -> None:
    if not has_network(expert.base.config, "trunk"):
        raise InputError(f"{needs}, but transformers has none for {expert.base.folder}; leave the task out")
    if lacking := missing_parameters(expert.base, "trunk"):
        raise InputError(f"{needs}, but the base lacks {lacking[0]}; leave the task out")


def _check_writes(needs: str, expert: Expert) -> None:
    ways_out = "leave the task out, or use kind completion if the experts are language models"
    for folder, config in ((expert.base.folder, expert.base.config), (expert.folder, expert.config)):
        if not config.is_encoder_decoder or not has_network(config, "seq2seq_lm"):
            raise InputError(f"{needs}, but {folder} ({config.model_type}) is none of texts; {ways_out}")
    if lacking := missing_parameters(expert.base, "seq2seq_lm"):
        raise InputError(f"{needs}, but the base lacks {lacking[0]}; expected a base with a language-model head")


def _check_ending(needs: str, ending: _Ending, expert: Expert) -> None:
    if expert.network not in ending.networks.values():
        made = "zero_shot, which makes a head of the names of classes, " if expert.network in _TOWERS else ""
        raise InputError(
            f"{needs}, but {expert.folder} is a {expert.network}; expected {ending.name} (its own, or a LoRA adapter "
            f"with {ending.with_type}its head in modules_to_save), {made}or leave the task out"
        )
