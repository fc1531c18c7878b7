"""A dynamic model: a folder whose base and task vectors answer every input with coefficients of its own (SE-Merging).

model = DynamicModel.load(Path("FOLDER"))
model.predict(["What is 3 plus 4?"])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.datasets import pad, tokens
from tasks.dynamic_folder import STATISTICS, check_files, load_network_with_heads, read_manifest
from tasks.errors import InputError
from tasks.evaluate import finite, generate, pad_token
from tasks.models.dynamic import DynamicNetwork
from tasks.models.heads import DetachedHead
from tasks.models.networks import load_tokenizer, positions
from tasks.models.probes import probe
from tasks.routing import RouterSettings, Rule, Statistics, affinities, coefficients


@dataclass(frozen=True)
class Router:
    """How samples get their coefficients."""

    rule: Rule
    statistics: Statistics
    settings: RouterSettings


@dataclass(frozen=True)
class Routes:
    """Where a batch of samples goes."""

    coefficients: Tensor
    """(B, K)"""
    experts: list[int]
    """the expert that each sample resembles most; its head answers"""


@dataclass(frozen=True)
class Prediction:
    """The answer to one text."""

    prediction: str
    """the continuation, or the name of the class"""
    expert: str
    """the expert that the text resembles most"""
    coefficients: dict[str, float]
    """by expert"""


class DynamicModel:
    """Base, task vectors, heads and router in memory. All methods take mixed batches and know nothing of tasks."""

    def __init__(
        self,
        network: DynamicNetwork,
        heads: Mapping[str, DetachedHead],
        experts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        router: Router,
        classifies: bool,
    ) -> None:
        """See `load`."""
        self.network = network
        self.heads = heads
        self.experts = tuple(experts)
        self.tokenizer = tokenizer
        self.router = router
        self.classifies = classifies
        self.device = network.network.device
        self._pad_id = pad_token(network.network, tokenizer)
        for each in (network.network, *(head.network for head in heads.values())):
            each.config.pad_token_id = self._pad_id  # by it the head of a decoder finds the last token

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: str | None = None, verify: bool = True) -> "DynamicModel":
        """Load a dynamic model.

        Args:
            folder: as stage route wrote it, or a copy.
            device: torch device.
            dtype: torch name of the dtype to run in; None takes the one that the route was made with.
            verify: read every file against its digest first.

        Raises:
            InputError: the folder is no dynamic model, or a file of it is missing or altered.
        """
        manifest = read_manifest(folder)
        if verify:
            check_files(folder, manifest)
        found = load_network_with_heads(folder, manifest.experts, manifest.head, dtype or manifest.dtype, device)
        values = {name: tensor.to(device) for name, tensor in load_file(folder / STATISTICS).items()}
        router = Router(manifest.rule, Statistics(**values), manifest.router)
        return cls(*found, manifest.experts, load_tokenizer(folder), router, manifest.head == "classification")

    def route(self, sequences: Sequence[list[int]]) -> Routes:
        """Return the routes of token sequences: probes up to the rule's block, then the router's mathematics."""
        router, rule = self.router, self.router.rule
        with torch.inference_mode():
            features = probe(self.network, self.batch(sequences), [rule], len(self.experts), router.settings.static)
            affinity = affinities(rule, features[rule.layer, rule.pool], router.statistics)
            chosen = coefficients(affinity, router.settings)
        return Routes(chosen, affinity.argmax(1).tolist())

    @property
    def passes(self) -> float:
        """Forward passes of the plain model that the route of one sample costs."""
        return self.router.rule.passes(len(self.experts), self.network.blocks)

    def batch(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return token sequences as a batch on the model's device, padded on the right."""
        return {name: values.to(self.device) for name, values in pad(sequences, self._pad_id).items()}

    def logits(self, sequences: Sequence[list[int]], routes: Routes) -> Tensor:
        """Return the language model's logits, (B, T, vocabulary), padding included."""
        with torch.inference_mode(), self.network.mixed(routes.coefficients) as network:
            found: Tensor = network(**self.batch(sequences), use_cache=False).logits
            return found

    def class_logits(self, sequences: Sequence[list[int]], routes: Routes, *heads: Sequence[str]) -> list[list[Tensor]]:
        """Return, for each assignment of heads (expert names) to the samples, the logits of every sample, float32.

        The trunk runs once for all assignments. Where the base itself is the classifier, its head is merged like
        the trunk, and answers in place of those assigned.
        """
        inputs = self.batch(sequences)
        with torch.inference_mode(), self.network.mixed(routes.coefficients) as network:
            if not self.heads:
                return [list(network(**inputs).logits.float())] * len(heads)
            output = network.base_model(**inputs)
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        return [self._head_logits(hidden, pooled, inputs, assigned) for assigned in heads]

    def _head_logits(
        self, hidden: Tensor, pooled: Tensor | None, inputs: Mapping[str, Tensor], assigned: Sequence[str]
    ) -> list[Tensor]:
        logits: dict[int, Tensor] = {}
        for name in dict.fromkeys(assigned):
            rows = [row for row, head in enumerate(assigned) if head == name]
            with torch.inference_mode():
                found = self.heads[name].logits(
                    hidden[rows],
                    None if pooled is None else pooled[rows],
                    {key: values[rows] for key, values in inputs.items()},
                )
            logits |= dict(zip(rows, found, strict=True))
        return [logits[row] for row in range(len(assigned))]

    def generate(self, prompts: Sequence[list[int]], routes: Routes, max_new_tokens: int) -> list[list[int]]:
        """Return greedy continuations in tokens, up to the end token (left out).

        The route, taken on the prompt, stays for the whole continuation, so the KV cache holds.
        """
        with torch.inference_mode(), self.network.mixed(routes.coefficients) as network:
            return generate(network, self.tokenizer, prompts, max_new_tokens, self._pad_id, self.device)

    def predict(
        self, texts: Sequence[str], max_new_tokens: int = 64, places: Sequence[str] | None = None
    ) -> list[Prediction]:
        """Answer texts in one batch: a class each (by the routed head), or a greedy continuation.

        Args:
            texts: the texts.
            max_new_tokens: length of a continuation at most.
            places: what messages call the texts; None for `text 0`, `text 1`, ….

        Raises:
            InputError: a text without a token, or longer than the model takes; an answer that is NaN or infinite.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        if not texts:
            return []
        places = places or [f"text {number}" for number in range(len(texts))]
        sequences = [self._tokens(text, place, max_new_tokens) for text, place in zip(texts, places, strict=True)]
        routes = self.route(sequences)
        finite(routes.coefficients)
        names = [self.experts[expert] for expert in routes.experts]
        if self.classifies:
            logits = self.class_logits(sequences, routes, names)[0]
            classes = [int(finite(values).argmax()) for values in logits]
            answers = [self._label(name, index) for name, index in zip(names, classes, strict=True)]
        else:
            generated = self.generate(sequences, routes, max_new_tokens)
            answers = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in generated]
        table = routes.coefficients.tolist()
        return [
            Prediction(answer, name, dict(zip(self.experts, row, strict=True)))
            for answer, name, row in zip(answers, names, table, strict=True)
        ]

    def _tokens(self, text: str, where: str, max_new_tokens: int) -> list[int]:
        ids: list[int] = (
            self.tokenizer(text, verbose=False)["input_ids"]
            if self.classifies
            else tokens(text, self.tokenizer, front=True)
        )
        new = 0 if self.classifies else max_new_tokens
        room = (positions(self.network.network.config) or len(ids) + new) - new
        if room < 1:
            raise InputError(f"max_new_tokens is {new}; the model takes {room + new} tokens, prompt included: lower it")
        if not 0 < len(ids) <= room:
            raise InputError(f"{where} has {len(ids)} tokens; the model takes 1 to {room}: shorten it")
        return ids

    def _label(self, head: str, index: int) -> str:
        owner = self.heads[head].network if head in self.heads else self.network.network
        return str(owner.config.id2label[index])
