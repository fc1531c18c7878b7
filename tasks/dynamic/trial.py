"""A trial of application se on a small network of the same kind: what is believed of its modules is checked.

Some networks read a linear layer's weight without calling it, or call it with something else than its name promises.
So what coefficients per sample give is compared with weights that are written out. Modules that fail are written out
in the whole network too; a network that cannot even be run so is refused before any work.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from sensmerge.tasks.dynamic.network import DynamicNetwork, unlinear
from sensmerge.tasks.dynamic.vectors import Dense, LowRank, Vector
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import is_seq2seq, positions
from sensmerge.tasks.networks.readers import random_pictures, read_by
from sensmerge.tasks.networks.stand_in import pattern, stand_ins

TOLERANCE = 1e-4
"""Of differences, in parts of the largest value: far above what rounding does, far below what a wrong weight does."""
_SAMPLES, _TOKENS, _EXPERTS, _NEW, _PADDED = 3, 17, 2, 2, 2
"""Sizes that cannot be taken for each other; enough tokens for what compresses several into one."""


@dataclass(frozen=True)
class Trial:
    """What a trial found."""

    written: frozenset[str]
    """parameters that must be written out for each row of coefficients"""
    is_checked: bool
    """whether a small network of the kind could be made; if not, all that experts change is written out"""

    def notes(self, network: PreTrainedModel, key: str) -> list[str]:
        """Return what a user should know of what is written out and what it costs: no line or one.

        Args:
            network: the whole network; it may lie on the meta device.
            key: recipe key, for messages.
        """
        if not self.written:
            return []
        kinds = sorted({pattern(name) for name in self.written})
        named = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3} more" if len(kinds) > 3 else "")
        sizes = {name: one.numel() for name, one in network.named_parameters()}
        share = sum(sizes[name] for name in self.written) / sum(sizes.values())
        why = "have no linear form" if self.is_checked else "could not be tried on a small network of this kind"
        return [
            f"{key}: of {type(network).__name__}, {named} {why} and are written out for every distinct row of "
            f"coefficients: a batch takes a pass for each, and memory for {share:.0%} of the weights once more"
        ]


def try_network(config: PretrainedConfig, network: PreTrainedModel, changed: Collection[str], key: str) -> Trial:
    """Find what must be written out for each row of coefficients.

    Args:
        config: of the network.
        network: the whole network; it may lie on the meta device.
        changed: names of its parameters that some expert changes.
        key: recipe key, for messages.

    Raises:
        InputError: a network of this kind cannot be run so.
    """
    kinds = {pattern(name) for name in changed}
    for small, is_whole in stand_ins(config, network):
        run = _Run(small, kinds)
        try:
            expected = run.answers(set(run.vectors))
        except Exception as error:  # whatever an architecture raises when it is run in a way that it cannot be
            if is_whole or run.works_alone():
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise InputError(
                    f"{key}: {type(network).__name__} cannot be run with coefficients per sample ({reason[:200]}); "
                    "use application: {kind: static}"
                ) from error
            continue
        patterns = {pattern(name) for name in run.unlike(expected)}
        return Trial(frozenset(name for name in changed if pattern(name) in patterns), True)
    return Trial(frozenset(changed), False)


class _Run:
    """A small network, and task vectors of the kinds that the whole network's experts have."""

    def __init__(self, network: PreTrainedModel, kinds: Collection[str]) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return 0.1 * torch.randn(shape, generator=generator)

        self.vectors: dict[str, dict[int, Vector]] = {}
        for name, one in network.named_parameters():
            if pattern(name) in kinds:
                self.vectors[name] = {0: Dense(random(*one.shape)), 1: Dense(random(*one.shape))}
                if one.dim() == 2 and name.endswith(".weight"):  # as adapters have it
                    self.vectors[name][1] = LowRank(random(2, one.shape[1]), random(one.shape[0], 2))
        self._network = network
        self._coefficients = torch.tensor([[1.0, 0.0], [0.6, -0.4], [0.0, 0.8]])
        self._pictures = None
        if read_by(network) == "pictures":
            self._pictures = random_pictures(network.config, _SAMPLES, generator)
            return
        room = (positions(network.config) or _TOKENS + _NEW) - _NEW
        network.config.get_text_config().pad_token_id = network.config.pad_token_id = 0
        # `generate` would fill gaps from the network's own.
        network.generation_config = generation = copy.deepcopy(_GENERATION)
        generation.decoder_start_token_id = getattr(network.config, "decoder_start_token_id", None)
        text = network.config.get_text_config()
        self._tokens = min(_TOKENS, room)
        # Some have no vocabulary: they hash what others look up.
        most = min(getattr(text, "vocab_size", None) or 200, 200)
        self._ids = torch.randint(3, most, (_SAMPLES, self._tokens), generator=generator)
        if network.config.is_encoder_decoder and isinstance(text.eos_token_id, int):
            # Heads of encoder-decoders look for the end of a text, and for only one.
            self._ids[self._ids == text.eos_token_id] += 1
            self._ids[:, -_PADDED - 1] = text.eos_token_id
        self._labels = self._ids[:, 3:].clone()  # for encoder-decoders that write, as long as nothing else
        self._labels[0, -_PADDED:] = -100

    def unlike(self, expected: Mapping[str, Tensor]) -> set[str]:
        """Return the names of what must be written out for the network to answer as expected.

        Args:
            expected: the answers with all written out.
        """
        written = unlinear(self._network, self.vectors)
        if self._agrees(written, expected):
            return written
        kinds = {pattern(name) for name in self.vectors} - {pattern(name) for name in written}
        for kind in sorted(kinds):
            alone = _Run(self._network, {kind})
            if not alone._agrees(set(), alone.answers(set(alone.vectors))):
                written |= set(alone.vectors)
        return written if self._agrees(written, expected) else set(self.vectors)

    def _agrees(self, written: Collection[str], expected: Mapping[str, Tensor]) -> bool:
        try:
            found = self.answers(written)
        except Exception:  # samples that cannot be told apart, or shapes that the network does not expect
            return False
        return all(
            bool((found[name] - values).abs().max() <= TOLERANCE * values.abs().max())
            for name, values in expected.items()
        )

    @torch.inference_mode()
    def answers(self, written: Collection[str]) -> dict[str, Tensor]:
        """Return all that a dynamic model makes of a batch: logits, those of a continuation, and hidden states."""
        dynamic = DynamicNetwork(self._network, self.vectors, _EXPERTS, written)
        found: dict[str, list[Tensor]] = {}
        for rows in dynamic.together(self._coefficients):
            with dynamic.mixed(self._coefficients[rows]):
                answers = self._answers(rows)
            for name, values in answers.items():
                places = found.setdefault(name, [torch.empty(0)] * _SAMPLES)
                for row, one in zip(rows, values, strict=True):
                    places[row] = one
        assert dynamic.blocks, "it has no numbered blocks"
        layers = list(range(1, dynamic.blocks + 1))
        states = dynamic.hidden_states(self._inputs(right=True), self._coefficients, layers)
        for layer, one in states.items():
            assert self._is_by_token(one), f"block {layer} gives states of shape {tuple(one.shape)}"
        return {name: torch.stack(values) for name, values in found.items()} | {
            f"layer {layer}": values for layer, values in states.items()
        }

    def _is_by_token(self, states: Tensor) -> bool:
        if self._pictures is not None:
            return states.dim() == 3 and len(states) == _SAMPLES
        return states.shape[:2] == (_SAMPLES, self._tokens)

    @torch.inference_mode()
    def works_alone(self) -> bool:
        """Return whether the network answers without task vectors: it has not been made small in a wrong way."""
        try:
            self._answers(list(range(_SAMPLES)))
        except Exception:  # whatever becomes of settings that do not go together
            return False
        return True

    def _answers(self, rows: list[int]) -> dict[str, Tensor]:
        """Return the network's logits of some samples, and those of a continuation if it is a language model."""
        right, left = ({name: one[rows] for name, one in self._inputs(side).items()} for side in (True, False))
        if not self._network.can_generate():
            return {"logits": self._network(**right).logits}
        labels = {}
        if is_seq2seq(self._network):
            left, labels = right, {"labels": self._labels[rows]}
        continued = self._network.generate(**left, generation_config=self._network.generation_config)
        return {
            "logits": self._network(**right, **labels, use_cache=False).logits,
            "continued": torch.stack(continued.logits, dim=1),
        }

    def _inputs(self, right: bool) -> dict[str, Tensor]:
        """Return the batch; the first sample, if a text, is shorter, with its padding on the right or on the left."""
        if self._pictures is not None:
            return self._pictures
        ids, mask = self._ids.clone(), torch.ones_like(self._ids)
        place = slice(self._tokens - _PADDED, self._tokens) if right else slice(0, _PADDED)
        ids[0, place], mask[0, place] = 0, 0
        return {"input_ids": ids, "attention_mask": mask}


_GENERATION = GenerationConfig(
    max_new_tokens=_NEW,
    do_sample=False,
    num_beams=1,
    eos_token_id=None,
    pad_token_id=0,
    output_logits=True,
    return_dict_in_generate=True,
)
