"""What a network reads of a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sensmerge.tasks.networks.pictures import Picture
from sensmerge.tasks.networks.tokens import Inputs


@dataclass(frozen=True)
class Sample:
    """What a network reads of a row."""

    inputs: Inputs
    """by the network's argument: token ids as a list, a picture, or a tensor of one shape for all samples"""
    prompt_tokens: int = 0
    """how many leading tokens are context: they are read, not scored"""
    label: int | float | tuple[int, ...] | None = None
    """what a head of the expert's own should answer: the class, or that of each token (−100 where none counts), or a
    number"""

    @property
    def input_ids(self) -> list[int]:
        """The whole text in tokens, special tokens included; none where the network reads something else."""
        found: list[int] = self.inputs.get("input_ids", [])
        return found

    @property
    def tokens(self) -> list[int]:
        """All tokens that a network reads."""
        return self.input_ids

    def positions(self, new_tokens: int) -> int:
        """Return how many positions a network has to know for the sample, and for an answer of so many tokens."""
        return max(len(self.input_ids), len(self.prompt.get("input_ids", ())) + new_tokens)

    @property
    def scored_from(self) -> int:
        """Index of the first scored token; never 0, because nothing predicts the first token of a text."""
        return max(self.prompt_tokens, 1)

    @property
    def scored(self) -> Sequence[int]:
        """Indices of the scored tokens."""
        return range(self.scored_from, len(self.input_ids))

    @property
    def prompt(self) -> Inputs:
        """What stands before the answer: by it a sample is routed, and from it an answer generated."""
        if "input_ids" not in self.inputs:
            return self.inputs
        return {**self.inputs, "input_ids": self.input_ids[: self.prompt_tokens]}

    @property
    def has_prompt(self) -> bool:
        """Whether there is something before the answer."""
        return self.prompt_tokens > 0 or "input_ids" not in self.inputs

    @property
    def content(self) -> tuple[Any, ...]:
        """What two samples share that are the same to a model, and have the same answer."""
        return (*self.inputs, *map(_content, self.inputs.values()), self.prompt_tokens, self.label)


def _content(value: Any) -> Any:
    """Return what two values share that are the same to a network."""
    match value:
        case list():
            return tuple(value)
        case Picture():
            return value.read
        case _:
            return value.numpy().tobytes()
