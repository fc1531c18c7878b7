"""Whether the kind of each task has a meaning for the network of its expert."""

from collections.abc import Collection, Mapping

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import Task
from sensmerge.tasks.networks.base import missing_parameters
from sensmerge.tasks.networks.causality import not_causal
from sensmerge.tasks.networks.expert import Expert
from sensmerge.tasks.networks.networks import has_network
from sensmerge.tasks.networks.pictures import Reads

_CLASSIFIERS: Mapping[Reads, Collection[str]] = {
    "texts": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    "pictures": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
}


def check_kinds(tasks: Mapping[str, Task], experts: Mapping[str, Expert]) -> None:
    """Check that the kind of each task has a meaning for the network of its expert.

    Raises:
        InputError: it has none, or a package is not installed; it names the recipe's key and a way out.
    """
    for name, task in tasks.items():
        expert = experts[name]
        if task.head == "seq2seq_lm":
            _check_writes(f"tasks.{name}.kind: {task.kind} needs an encoder-decoder that writes", expert)
        elif not task.has_own_head:
            _check_continues(f"tasks.{name}.kind: {task.kind} needs a language model", expert)
        elif not _classifies(expert, task.reads):
            how = "with" if task.reads == "pictures" else "with task_type SEQ_CLS and"
            raise InputError(
                f"tasks.{name}.kind: {task.kind}, but {expert.folder} is a {expert.network}; expected a classifier of "
                f"{task.reads} (its own, or a LoRA adapter {how} its head in modules_to_save), or leave the task out"
            )
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


def _check_writes(needs: str, expert: Expert) -> None:
    ways_out = "leave the task out, or use kind completion if the experts are language models"
    for folder, config in ((expert.base.folder, expert.base.config), (expert.folder, expert.config)):
        if not config.is_encoder_decoder or not has_network(config, "seq2seq_lm"):
            raise InputError(f"{needs}, but {folder} ({config.model_type}) is none of texts; {ways_out}")
    if lacking := missing_parameters(expert.base, "seq2seq_lm"):
        raise InputError(f"{needs}, but the base lacks {lacking[0]}; expected a base with a language-model head")


def _classifies(expert: Expert, reads: Reads) -> bool:
    return expert.network in _CLASSIFIERS[reads]
