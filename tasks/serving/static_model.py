"""A static merge that answers texts or pictures: a language model continues texts, an encoder-decoder answers them, a
head says their class or their number.

model = StaticModel.load(Path("FOLDER"))
model.predict(["What is 3 plus 4?"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import load_network
from sensmerge.tasks.networks.generation import generate, set_end_tokens
from sensmerge.tasks.networks.heads import SavedHead
from sensmerge.tasks.networks.known import why_unknown
from sensmerge.tasks.networks.networks import Head, load_config, network_class, trunk_name
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.networks.readers import load_reader, read_by
from sensmerge.tasks.networks.texts import head_answer, inputs_of
from sensmerge.tasks.networks.tokens import collate, pad_token

Form = Literal["language_model", "encoder_decoder", "classifier", "picture_classifier", "trunk"]
"""What a static merge is: one whole network, or the trunk of several classifiers, whose heads lie beside it."""

_CLASSES: Mapping[Form, Any] = {
    "language_model": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "encoder_decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "picture_classifier": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
"""Classes of whole networks by their config."""
_HEADS: Mapping[Form, Head] = {
    "language_model": "causal_lm",
    "encoder_decoder": "seq2seq_lm",
    "classifier": "classification",
    "picture_classifier": "classification",
}
"""What a merge that is one whole network ends in."""

WHOLE = ""
"""Name of the only network of a merge that is one whole network."""


def form_of(folder: Path) -> Form | None:
    """Return what the static merge in a folder is; None for what neither continues texts nor classifies.

    That is so of all that no class of transformers reads.

    Raises:
        InputError: transformers has the class, but its config is not in order.
    """
    if head_names(folder):
        return "trunk"
    if why_unknown(folder) is not None:
        return None
    config = load_config(folder)
    own = network_class(config, None, folder)
    for form, mapping in _CLASSES.items():
        if own is mapping.get(type(config), None) and (form != "encoder_decoder" or config.is_encoder_decoder):
            return form
    return None


def reads_of(folder: Path, base: Path) -> Reads:
    """Return what a merged model reads.

    Args:
        folder: of a static merge that has a form, or of a dynamic model.
        base: the folder that has its config, if no head's has.
    """
    heads = head_names(folder)
    place = folder / HEADS / heads[0] if heads else base
    return read_by(network_class(load_config(place), "classification" if heads else None, place))


def head_names(folder: Path) -> list[str]:
    """Return the tasks whose heads lie beside a merged trunk."""
    return sorted(path.name for path in (folder / HEADS).glob("*/"))


class StaticModel:
    """The networks of a static merge in memory, by the task whose head they end in; heads share one trunk."""

    def __init__(self, networks: Mapping[str, PreTrainedModel], tokenizer: Any, form: Form) -> None:
        """See `load`; of a model that reads pictures, the tokenizer is its image processor."""
        self.networks = networks
        self.tokenizer = tokenizer
        self.form = form
        self._pad_id = pad_token(next(iter(networks.values())), tokenizer)
        for network in networks.values():
            network.config.pad_token_id = self._pad_id  # by it the head of a decoder finds the last token

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: str = "float32") -> "StaticModel":
        """Load a static merge.

        Args:
            folder: as stage merge wrote it, or a copy.
            device: torch device.
            dtype: torch name of the dtype to run in.

        Raises:
            InputError: the folder holds no merge that answers texts or pictures, or a file of it is missing.
        """
        if (folder / ADAPTER_CONFIG).is_file():
            raise InputError(f"{folder}: is a LoRA adapter of its base; load that, and PeftModel.from_pretrained on it")
        form = form_of(folder)
        if form is None:
            raise InputError(f"{folder}: is no language model and no classifier; load it with transformers")
        base, torch_dtype = open_base(folder), getattr(torch, dtype)
        if form == "trunk":
            networks: dict[str, PreTrainedModel] = {}
            for name in head_names(folder):
                head = SavedHead(folder / HEADS / name)
                networks[name] = load_network(base, head.ending, torch_dtype, device, head)
                _share_trunk(networks, name, head)
        else:
            networks = {WHOLE: load_network(base, _HEADS[form], torch_dtype, device)}
            if form in ("language_model", "encoder_decoder"):
                set_end_tokens(networks[WHOLE], folder, folder)
        reads = read_by(next(iter(networks.values())))
        return cls(networks, load_reader(folder, reads), form)

    def network(self, task: str | None = None) -> PreTrainedModel:
        """Return the network that answers: the only one, or the one with a task's head.

        Raises:
            InputError: the task is not one of those that have a head, or there are several and none is named.
        """
        names = [name for name in self.networks if name != WHOLE]
        if task is None and len(self.networks) == 1:
            return next(iter(self.networks.values()))
        if task is None or task not in names:
            expected = f"one of {', '.join(names)}" if names else "none, the model is one whole network"
            raise InputError(f"task is {task}; expected {expected}")
        return self.networks[task]

    def predict(self, texts: Sequence[str | bytes], max_new_tokens: int = 64, task: str | None = None) -> list[str]:
        """Answer texts, or pictures, in one batch: a greedy continuation of each, or what a head says of it.

        Args:
            texts: the texts; of a model that reads pictures, their files, as bytes or in base64.
            max_new_tokens: length of a continuation or answer at most.
            task: whose head answers, where there are several (classifiers).

        Raises:
            InputError: a text without a token, or longer than the model takes; what is no picture; an unknown task; an
                answer that is NaN or infinite.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        network = self.network(task)
        new = max_new_tokens if self.form in ("language_model", "encoder_decoder") else None
        what = "picture" if read_by(network) == "pictures" else "text"
        samples = inputs_of(texts, self.tokenizer, network, new, [f"{what} {number}" for number in range(len(texts))])
        if not samples:
            return []
        with torch.inference_mode():
            if new is not None:
                found = generate(network, self.tokenizer, samples, new, self._pad_id, network.device)
                return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
            batch = {name: values.to(network.device) for name, values in collate(samples, self._pad_id).items()}
            logits = network(**batch).logits
        return [head_answer(one, text, self.tokenizer, network) for one, text in zip(logits, texts, strict=True)]


def _share_trunk(networks: Mapping[str, PreTrainedModel], name: str, head: SavedHead) -> None:
    """Give a network the trunk of the first one, unless a part of its own head lies in the trunk: a pooler, say."""
    first, network = next(iter(networks.values())), networks[name]
    prefix = trunk_name(network)
    if network is not first and not any(key.startswith(f"{prefix}.") for key in head.head_tensors()):
        setattr(network, prefix, getattr(first, prefix))
