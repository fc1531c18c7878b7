"""A dynamic model: a folder whose base and task vectors answer every input with coefficients of its own (SE-Merging).

model = DynamicModel.load(Path("FOLDER"))
model.predict(["What is 3 plus 4?"])
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sensmerge.tasks.dynamic.folder import (
    MANIFEST,
    STATISTICS,
    check_files,
    check_names,
    load_network_with_heads,
    read_manifest,
)
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.probes import probe_all
from sensmerge.tasks.dynamic.router import RouterSettings, Rule, Statistics, affinities, coefficients
from sensmerge.tasks.dynamic.sense import read_statistics
from sensmerge.tasks.dynamic.vectors import BASE
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.kinds.questions import Question, plain, prompts_of, read_questions
from sensmerge.tasks.networks.endings import OWN_HEADS, WRITING_HEADS
from sensmerge.tasks.networks.generation import (
    GREEDY,
    MAX_NEW_TOKENS,
    Decoding,
    check_unused,
    generate,
    set_end_tokens,
    until,
    written,
)
from sensmerge.tasks.networks.heads import DetachedHead
from sensmerge.tasks.networks.networks import finite, trunk_or_self
from sensmerge.tasks.networks.piecewise import Listen, pieces, settled
from sensmerge.tasks.networks.readers import load_reader, read_by
from sensmerge.tasks.networks.texts import head_answer
from sensmerge.tasks.networks.tokens import PADDING as LITTLE_PADDING
from sensmerge.tasks.networks.tokens import Inputs, batches, collate, length, pad_token

PADDING = 0.25
"""Share of a sample's place in a part of a mixed batch that is padding at most: smaller parts would cost more."""


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
    """Base, task vectors, heads and router in memory. All methods take mixed samples and are not told their tasks.

    What is linear in the number of tokens, padding included, is done in parts of the samples that need little of it.
    Those who answer many samples at once give a `size`: then no part has more tokens than so many samples that are as
    long as the longest, and weights are written out for samples that take the same of every expert, where these are
    many (`DynamicNetwork.alike`). Without it memory stays what it is, as servers need it.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        heads: Mapping[str, DetachedHead],
        experts: Sequence[str],
        tokenizer: Any,
        router: Router,
        classifies: bool,
    ) -> None:
        """See `load`; of a model that reads pictures, the tokenizer is its image processor."""
        self.network = network
        self.heads = heads
        self.experts = tuple(experts)
        self.tokenizer = tokenizer
        self.router = router
        self.classifies = classifies
        self.prompts: Mapping[str, RowTask] = {}
        """the tasks that it can be asked in their prompts, by name"""
        self._busy = Lock()  # coefficients of a batch are set on the network while it runs
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
            InputError: the folder is no dynamic model, a file of it is missing or altered, there is one too many, or
                they do not fit together.
        """
        manifest = read_manifest(folder)
        if verify:
            check_files(folder, manifest)
        check_names(folder, manifest)
        network, heads = load_network_with_heads(
            folder, manifest.experts, manifest.head, dtype or manifest.dtype, device
        )
        if manifest.head in WRITING_HEADS:
            set_end_tokens(network.network, folder / BASE, folder / BASE)
        if manifest.rule.layer > network.blocks:
            raise InputError(
                f"{folder}: its manifest routes by layer {manifest.rule.layer}, but the base has {network.blocks} "
                "blocks; copy the folder again"
            )
        reads, width = read_by(network.network), network.width(manifest.rule.layer)
        statistics = read_statistics(folder / STATISTICS, manifest.rule, len(manifest.experts), width)
        router = Router(manifest.rule, statistics, manifest.router)
        reader = load_reader(folder / BASE, reads)
        model = cls(network, heads, manifest.experts, reader, router, manifest.head in OWN_HEADS)
        model.prompts = prompts_of(manifest.tasks, str(folder / MANIFEST))
        return model

    def route(self, samples: Sequence[Inputs], size: int | None = None) -> Routes:
        """Return the routes of samples: probes up to the rule's block, then the router's mathematics."""
        router, rule = self.router, self.router.rule
        places = batches([length(sample) for sample in samples], size, PADDING if size is None else LITTLE_PADDING)
        inputs = [self.batch([samples[row] for row in rows]) for rows in places]
        order = torch.tensor([row for rows in places for row in rows]).argsort()
        with torch.inference_mode():
            static, many = router.settings.static, size is not None
            features = probe_all(self.network, inputs, [rule], len(self.experts), static, alike=many)
            affinity = affinities(rule, features[rule.layer, rule.pool], router.statistics)[order]
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
        found = dict(self.each_logits(samples, routes))
        return [found[row] for row in range(len(samples))]

    def each_logits(
        self, samples: Sequence[Inputs], routes: Routes, size: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the place of each sample and its `logits`, in any order: no more than a part's are in memory."""
        for network, rows in self._answering(samples, routes, size):
            with torch.inference_mode():
                logits = network(**self.batch([samples[row] for row in rows]), use_cache=False).logits
            yield from zip(rows, logits, strict=True)

    def class_logits(
        self, samples: Sequence[Inputs], routes: Routes, *heads: Sequence[str], size: int | None = None
    ) -> list[list[Tensor]]:
        """Return, for each assignment of heads (expert names) to the samples, the logits of every sample, float32.

        The trunk runs once for all assignments. Where the base itself is the classifier, its head is merged like
        the trunk, and answers in place of those assigned.
        """
        found: dict[int, tuple[Tensor, ...]] = {}
        for network, rows in self._answering(samples, routes, size):
            inputs = self.batch([samples[row] for row in rows])
            with torch.inference_mode():
                if not self.heads:
                    logits = network(**inputs).logits.float()
                    found |= {row: (values,) * len(heads) for row, values in zip(rows, logits, strict=True)}
                    continue
                output = trunk_or_self(network)(**inputs)
            hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            assigned = [[names[row] for row in rows] for names in heads]
            by_head = [self._head_logits(hidden, pooled, inputs, names) for names in assigned]
            found |= zip(rows, zip(*by_head, strict=True), strict=True)
        return [list(one) for one in zip(*(found[row] for row in range(len(samples))), strict=True)]

    def _answering(
        self, samples: Sequence[Inputs], routes: Routes, size: int | None, new_tokens: int = 0
    ) -> Iterator[tuple[PreTrainedModel, list[int]]]:
        """Yield the network as it answers some of the samples, and their places, until all are answered."""
        chosen, lengths = routes.coefficients, [length(sample) + new_tokens for sample in samples]
        # Of padding before new tokens little is computed: samples of all lengths run together.
        little, more = (1.0, 1.0) if new_tokens else (LITTLE_PADDING, PADDING)
        many = [] if size is None else self._alike(chosen, lengths)
        rest = sorted(set(range(len(samples))).difference(*many))
        for group in many:
            with self.network.alike(chosen[group[0]]) as network:
                for part in batches([lengths[row] for row in group], size, little):
                    yield network, [group[place] for place in part]
        for places in self.network.together(chosen[rest]) if rest else ():
            group = [rest[place] for place in places]
            for part in batches([lengths[row] for row in group], size, more):
                rows = [group[place] for place in part]
                with self.network.mixed(chosen[rows]) as network:
                    yield network, rows

    def _alike(self, coefficients: Tensor, tokens: Sequence[int]) -> list[list[int]]:
        """Return groups of samples with equal coefficients for which weights are to be written out."""
        groups: dict[tuple[float, ...], list[int]] = {}
        for row, values in enumerate(coefficients.tolist()):
            groups.setdefault(tuple(values), []).append(row)
        return [rows for rows in groups.values() if self.network.writes_out(sum(tokens[row] for row in rows))]

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

    def generate(
        self,
        prompts: Sequence[Inputs],
        routes: Routes,
        max_new_tokens: int,
        size: int | None = None,
        decoding: Decoding = GREEDY,
        listen: Listen | None = None,
    ) -> list[list[int]]:
        """Return continuations in tokens, up to an end token (left out).

        The route, taken on the prompt, stays for the whole continuation, so the KV cache holds. Without a `size`, all
        that can be answered together is. `decoding` and `listen` are as in `networks.generation.generate`.
        """
        found: dict[int, list[int]] = {}
        for network, rows in self._answering(prompts, routes, size, max_new_tokens):
            own = [prompts[row] for row in rows]
            with torch.inference_mode():
                answers = generate(network, self.tokenizer, own, max_new_tokens, decoding, listen)
            found |= zip(rows, answers, strict=True)
        return [found[row] for row in range(len(prompts))]

    def predict(
        self,
        questions: Sequence[Question],
        max_new_tokens: int | None = None,
        places: Sequence[str] | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[Prediction]:
        """Answer questions in one batch: what the routed head says of each (`head_answer`), or a continuation.

        Args:
            questions: texts, read as they are; of a model that reads pictures, their files, as bytes or in base64; or
                rows, of which a `task` (one of `prompts`) or `messages` say how they are asked.
            max_new_tokens: length of a continuation at most; None: 64.
            places: what messages call the questions; None for `text 0`, `text 1`, ….
            decoding: how tokens of continuations are chosen.

        Raises:
            InputError: a text without a token, or longer than the model takes; what is no picture; a row that cannot be
                asked; settings of continuations for a classifier; an answer that is NaN or infinite.
        """
        samples = self.read(questions, max_new_tokens, places, decoding)
        if not samples:
            return []
        with self._busy:
            routes = self.route(samples)
            finite(routes.coefficients)
            names = [self.experts[expert] for expert in routes.experts]
            if self.classifies:
                logits = self.class_logits(samples, routes, names)[0]
                answers = [
                    head_answer(values, plain(one), self.tokenizer, self._owner(name))
                    for values, one, name in zip(logits, questions, names, strict=True)
                ]
            else:
                most = max_new_tokens or MAX_NEW_TOKENS
                generated = self.generate(samples, routes, most, decoding=decoding)
                answers = [written(ids, self.tokenizer, decoding.stop) for ids in generated]
        table = routes.coefficients.tolist()
        return [
            Prediction(answer, name, dict(zip(self.experts, row, strict=True)))
            for answer, name, row in zip(answers, names, table, strict=True)
        ]

    def stream(
        self, question: Question, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> Iterator[str]:
        """Yield the continuation of one question piece by piece, as soon as it is written.

        The pieces together are what `predict` answers. Other calls of the model wait until the continuation ends, or
        the iterator is closed.

        Args:
            question: as one of those of `predict`.
            max_new_tokens: length of the continuation at most; None: 64.
            decoding: how its tokens are chosen.

        Raises:
            InputError: as `predict`, before the first piece; a model that classifies.
        """
        if self.classifies:
            raise InputError("the model writes no text, so there is none to stream; use predict")
        samples, most = self.read([question], max_new_tokens, None, decoding), max_new_tokens or MAX_NEW_TOKENS

        def write(listen: Listen) -> str:
            def heard(text: str) -> None:
                listen(until(text, decoding.stop))

            with self._busy:
                routes = self.route(samples)
                finite(routes.coefficients)
                (ids,) = self.generate(samples, routes, most, None, decoding, heard)
            return written(ids, self.tokenizer, decoding.stop)

        cleans = bool(getattr(self.tokenizer, "clean_up_tokenization_spaces", False))
        return pieces(write, lambda text: settled(text, decoding.stop, cleans))

    def read(
        self,
        questions: Sequence[Question],
        max_new_tokens: int | None = None,
        places: Sequence[str] | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[Inputs]:
        """Return what the network reads of questions; arguments and errors as `predict`."""
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        if self.classifies:
            check_unused(max_new_tokens, decoding)
        network = self.network.network
        what = "picture" if read_by(network) == "pictures" else "text"
        places = places or [f"{what} {number}" for number in range(len(questions))]
        new = None if self.classifies else max_new_tokens or MAX_NEW_TOKENS
        return read_questions(questions, self.prompts, self.tokenizer, network, new, places)

    def _owner(self, head: str) -> PreTrainedModel:
        return self.heads[head].network if head in self.heads else self.network.network
