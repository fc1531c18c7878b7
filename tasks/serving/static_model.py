"""A static merge that answers texts or pictures: a language model continues texts, an encoder-decoder answers them, a
head says their class or their number.

model = StaticModel.load(Path("FOLDER"))
model.predict(["What is 3 plus 4?"])
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from sensmerge.tasks.checkpoints.weights import HEADS
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.questions import TASK, Prompts, Question, plain, read_questions
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import load_network
from sensmerge.tasks.networks.generation import (
    GREEDY,
    MAX_NEW_TOKENS,
    Decoding,
    check_unused,
    generate,
    set_end_tokens,
    written,
)
from sensmerge.tasks.networks.heads import SavedHead
from sensmerge.tasks.networks.known import why_unknown
from sensmerge.tasks.networks.networks import Head, load_config, network_class, trunk_name
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.networks.readers import load_reader, read_by
from sensmerge.tasks.networks.texts import head_answer
from sensmerge.tasks.networks.tokens import Inputs, collate, pad_token
from sensmerge.tasks.serving.form import Form, head_names

_CLASSES: Mapping[Form, Any] = {
    "language_model": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "encoder_decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "picture_classifier": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
"""Classes of whole networks by their config."""
WRITING_FORMS: tuple[Form, ...] = ("language_model", "encoder_decoder")
"""Those that answer with texts of their own."""
_HEADS: Mapping[Form, Head] = {
    "language_model": "causal_lm",
    "encoder_decoder": "seq2seq_lm",
    "classifier": "classification",
    "picture_classifier": "classification",
}
"""What a merge that is one whole network ends in."""

WHOLE = ""
"""Name of the only network of a merge that is one whole network."""
NO_PROMPTS: Prompts = {}


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


def checked_form(folder: Path) -> Form:
    """Return what the static merge in a folder is; see `form_of`.

    Raises:
        InputError: the folder holds no merge that answers texts or pictures.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder}: is a LoRA adapter of its base; load that, and PeftModel.from_pretrained on it")
    form = form_of(folder)
    if form is None:
        raise InputError(f"{folder}: is no language model and no classifier; load it with transformers")
    return form


def reads_of(folder: Path, base: Path) -> Reads:
    """Return what a merged model reads.

    Args:
        folder: of a static merge that has a form, or of a dynamic model.
        base: the folder that has its config, if no head's has.
    """
    heads = head_names(folder)
    place = folder / HEADS / heads[0] if heads else base
    return read_by(network_class(load_config(place), "classification" if heads else None, place))


class StaticModel:
    """The networks of a static merge in memory, by the task whose head they end in; heads share one trunk."""

    def __init__(self, networks: Mapping[str, PreTrainedModel], tokenizer: Any, form: Form, prompts: Prompts) -> None:
        """See `load`; of a model that reads pictures, the tokenizer is its image processor."""
        self.networks = networks
        self.tokenizer = tokenizer
        self.form = form
        self.prompts = prompts
        """the tasks that it can be asked in their prompts, by name"""
        self._busy = Lock()  # settings of continuations are set on the network while it writes
        self._pad_id = pad_token(next(iter(networks.values())), tokenizer)
        for network in networks.values():
            network.config.pad_token_id = self._pad_id  # by it the head of a decoder finds the last token

    @classmethod
    def load(
        cls, folder: Path, device: str = "cpu", dtype: str = "float32", prompts: Prompts = NO_PROMPTS
    ) -> "StaticModel":
        """Load a static merge.

        Args:
            folder: as stage merge wrote it, or a copy.
            device: torch device.
            dtype: torch name of the dtype to run in.
            prompts: tasks that it is to be asked in their prompts: a merge is the same whatever is asked of it.

        Raises:
            InputError: the folder holds no merge that answers texts or pictures, or a file of it is missing.
        """
        form = checked_form(folder)
        base, torch_dtype = open_base(folder), getattr(torch, dtype)
        if form == "trunk":
            networks: dict[str, PreTrainedModel] = {}
            for name in head_names(folder):
                head = SavedHead(folder / HEADS / name)
                networks[name] = load_network(base, head.ending, torch_dtype, device, head)
                _share_trunk(networks, name, head)
        else:
            networks = {WHOLE: load_network(base, _HEADS[form], torch_dtype, device)}
            if form in WRITING_FORMS:
                set_end_tokens(networks[WHOLE], folder, folder)
        reads = read_by(next(iter(networks.values())))
        return cls(networks, load_reader(folder, reads), form, prompts)

    def network(self, task: str | None = None) -> PreTrainedModel:
        """Return the network that answers: the only one, or the one with a task's head.

        Raises:
            InputError: the task is not one of those that have a head, or there are several and none is named.
        """
        names = [name for name in self.networks if name != WHOLE]
        if task is None and len(self.networks) == 1:
            return next(iter(self.networks.values()))
        if task is None or task not in names:
            expected = (
                f"the parameter task, one of {', '.join(names)}: its head answers"
                if names
                else "none, the model is one whole network"
            )
            raise InputError(f"task is {task}; expected {expected}")
        return self.networks[task]

    @property
    def writes(self) -> bool:
        """Whether it answers with texts of its own."""
        return self.form in WRITING_FORMS

    def predict(
        self,
        questions: Sequence[Question],
        max_new_tokens: int | None = None,
        task: str | None = None,
        decoding: Decoding = GREEDY,
        places: Sequence[str] | None = None,
    ) -> list[str]:
        """Answer questions in one batch: a continuation of each, or what a head says of it.

        Args:
            questions: texts, read as they are; of a model that reads pictures, their files, as bytes or in base64; or
                rows, of which a `task` (one of `prompts`) or `messages` say how they are asked.
            max_new_tokens: length of a continuation or answer at most; None: 64.
            task: whose head answers, where there are several (classifiers) and a row names none.
            decoding: how tokens of continuations are chosen.
            places: what messages call the questions; None for `text 0`, `text 1`, ….

        Raises:
            InputError: a text without a token, or longer than the model takes; what is no picture; a row that cannot be
                asked; an unknown task; settings of continuations for a classifier; an answer that is NaN or infinite.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        if not self.writes:
            check_unused(max_new_tokens, decoding)
        new = max_new_tokens or MAX_NEW_TOKENS if self.writes else None
        what = "picture" if read_by(next(iter(self.networks.values()))) == "pictures" else "text"
        places = places or [f"{what} {number}" for number in range(len(questions))]
        heads = [self._head(one, task) for one in questions] or [task]
        networks = {head: self.network(head) for head in heads}
        answers = [""] * len(questions)
        for head, network in networks.items():
            rows = [row for row in range(len(questions)) if heads[row] == head]
            asked, named = [questions[row] for row in rows], [places[row] for row in rows]
            samples = read_questions(asked, self.prompts, self.tokenizer, network, new, named)
            for row, answer in zip(rows, self._answers(network, asked, samples, new, decoding), strict=True):
                answers[row] = answer
        return answers

    def _head(self, question: Question, task: str | None) -> str | None:
        """Return the task whose head answers a question."""
        named = question.get(TASK) if isinstance(question, Mapping) and self.form == "trunk" else None
        return named if isinstance(named, str) else task

    def _answers(
        self,
        network: PreTrainedModel,
        questions: Sequence[Question],
        samples: Sequence[Inputs],
        new: int | None,
        decoding: Decoding,
    ) -> list[str]:
        if not samples:
            return []
        with self._busy, torch.inference_mode():
            if new is not None:
                found = generate(network, self.tokenizer, samples, new, decoding)
                return [written(ids, self.tokenizer, decoding.stop) for ids in found]
            batch = {name: values.to(network.device) for name, values in collate(samples, self._pad_id).items()}
            logits = network(**batch).logits
        pairs = zip(logits, questions, strict=True)
        return [head_answer(values, plain(one), self.tokenizer, network) for values, one in pairs]


def _share_trunk(networks: Mapping[str, PreTrainedModel], name: str, head: SavedHead) -> None:
    """Give a network the trunk of the first one, unless a part of its own head lies in the trunk: a pooler, say."""
    first, network = next(iter(networks.values())), networks[name]
    prefix = trunk_name(network)
    if network is not first and not any(key.startswith(f"{prefix}.") for key in head.head_tensors()):
        setattr(network, prefix, getattr(first, prefix))
