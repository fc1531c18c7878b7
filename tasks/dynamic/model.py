"""A dynamic model: a folder whose base and task vectors answer every input with coefficients of its own (SE-Merging).

model = DynamicModel.load(Path("FOLDER"))
model.predict(["What is 3 plus 4?"])
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sensmerge.tasks.dynamic.folder import STATISTICS, check_files, check_names, load_network_with_heads, read_manifest
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.probes import probe
from sensmerge.tasks.dynamic.router import RouterSettings, Rule, Statistics, affinities, coefficients
from sensmerge.tasks.dynamic.vectors import BASE
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.generation import generate, set_end_tokens
from sensmerge.tasks.networks.heads import DetachedHead
from sensmerge.tasks.networks.networks import finite, load_tokenizer
from sensmerge.tasks.networks.texts import text_inputs
from sensmerge.tasks.networks.tokens import Inputs, collate, length, pad_token

PADDING = 0.25
"""Share of a part of a batch that is padding, at most."""
Found = TypeVar("Found")


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


def parts(lengths: Sequence[int]) -> list[list[int]]:
    """Return the places of a batch's samples in parts of similar length: none is padded by more than `PADDING`."""
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if found and lengths[row] >= (1 - PADDING) * lengths[found[-1][0]]:
            found[-1].append(row)
        else:
            found.append([row])
    return found


class DynamicModel:
    """Base, task vectors, heads and router in memory. All methods take mixed batches and know nothing of tasks.

    What is linear in the number of tokens, padding included, is done in parts of the batch that need little of it.
    """

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
            InputError: the folder is no dynamic model, a file of it is missing or altered, or there is one too many.
        """
        manifest = read_manifest(folder)
        if verify:
            check_files(folder, manifest)
        check_names(folder, manifest)
        network, heads = load_network_with_heads(
            folder, manifest.experts, manifest.head, dtype or manifest.dtype, device
        )
        if manifest.head == "causal_lm":
            set_end_tokens(network.network, folder / BASE, folder / BASE)
        values = {name: tensor.to(device) for name, tensor in load_file(folder / STATISTICS).items()}
        router = Router(manifest.rule, Statistics(**values), manifest.router)
        reader = load_tokenizer(folder / BASE)
        return cls(network, heads, manifest.experts, reader, router, manifest.head == "classification")

    def route(self, samples: Sequence[Inputs]) -> Routes:
        """Return the routes of samples: probes up to the rule's block, then the router's mathematics."""
        router, rule = self.router, self.router.rule

        def resemblance(rows: list[int]) -> Tensor:
            inputs = self.batch([samples[row] for row in rows])
            features = probe(self.network, inputs, [rule], len(self.experts), router.settings.static)
            return affinities(rule, features[rule.layer, rule.pool], router.statistics)

        with torch.inference_mode():
            affinity = torch.stack(_in_parts(samples, resemblance, [list(range(len(samples)))]))
            chosen = coefficients(affinity, router.settings)
        return Routes(chosen, affinity.argmax(1).tolist())

    @property
    def passes(self) -> float:
        """Forward passes of the plain model that the route of one sample costs."""
        return self.router.rule.passes(len(self.experts), self.network.blocks)

    def batch(self, samples: Sequence[Inputs]) -> dict[str, Tensor]:
        """Return samples as a batch on the model's device, padded on the right."""
        return {name: values.to(self.device) for name, values in collate(samples, self._pad_id).items()}

    def logits(self, samples: Sequence[Inputs], routes: Routes) -> list[Tensor]:
        """Return the language model's logits of each sample, (tokens, vocabulary), or more rows that are padding."""

        def answers(rows: list[int]) -> Tensor:
            with torch.inference_mode(), self.network.mixed(routes.coefficients[rows]) as network:
                found: Tensor = network(**self.batch([samples[row] for row in rows]), use_cache=False).logits
                return found

        return _in_parts(samples, answers, self.network.together(routes.coefficients))

    def class_logits(self, samples: Sequence[Inputs], routes: Routes, *heads: Sequence[str]) -> list[list[Tensor]]:
        """Return, for each assignment of heads (expert names) to the samples, the logits of every sample, float32.

        The trunk runs once for all assignments. Where the base itself is the classifier, its head is merged like
        the trunk, and answers in place of those assigned.
        """

        def answers(rows: list[int]) -> list[tuple[Tensor, ...]]:
            inputs = self.batch([samples[row] for row in rows])
            with torch.inference_mode(), self.network.mixed(routes.coefficients[rows]) as network:
                if not self.heads:
                    return [(values,) * len(heads) for values in network(**inputs).logits.float()]
                output = network.base_model(**inputs)
            hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            assigned = [[names[row] for row in rows] for names in heads]
            return list(zip(*(self._head_logits(hidden, pooled, inputs, names) for names in assigned), strict=True))

        found = _in_parts(samples, answers, self.network.together(routes.coefficients))
        return [list(one) for one in zip(*found, strict=True)]

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

    def generate(self, prompts: Sequence[Inputs], routes: Routes, max_new_tokens: int) -> list[list[int]]:
        """Return greedy continuations in tokens, up to an end token (left out).

        The route, taken on the prompt, stays for the whole continuation, so the KV cache holds.
        """
        found: dict[int, list[int]] = {}
        for rows in self.network.together(routes.coefficients):
            own = [prompts[row] for row in rows]
            with torch.inference_mode(), self.network.mixed(routes.coefficients[rows]) as network:
                answers = generate(network, self.tokenizer, own, max_new_tokens, self._pad_id, self.device)
            found |= zip(rows, answers, strict=True)
        return [found[row] for row in range(len(prompts))]

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
        config, new = self.network.network.config, None if self.classifies else max_new_tokens
        samples = [
            text_inputs(text, self.tokenizer, config, new, place) for text, place in zip(texts, places, strict=True)
        ]
        routes = self.route(samples)
        finite(routes.coefficients)
        names = [self.experts[expert] for expert in routes.experts]
        if self.classifies:
            logits = self.class_logits(samples, routes, names)[0]
            classes = [int(finite(values).argmax()) for values in logits]
            answers = [self._label(name, index) for name, index in zip(names, classes, strict=True)]
        else:
            generated = self.generate(samples, routes, max_new_tokens)
            answers = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in generated]
        table = routes.coefficients.tolist()
        return [
            Prediction(answer, name, dict(zip(self.experts, row, strict=True)))
            for answer, name, row in zip(answers, names, table, strict=True)
        ]

    def _label(self, head: str, index: int) -> str:
        owner = self.heads[head].network if head in self.heads else self.network.network
        return str(owner.config.id2label[index])


def _in_parts(
    samples: Sequence[Inputs], work: Callable[[list[int]], Iterable[Found]], groups: Sequence[list[int]]
) -> list[Found]:
    """Return what some work finds for each sample; it is given the places of one part of a group at a time."""
    found: dict[int, Found] = {}
    for group in groups:
        for places in parts([length(samples[row]) for row in group]):
            rows = [group[place] for place in places]
            found |= zip(rows, work(rows), strict=True)
    return [found[row] for row in range(len(samples))]
