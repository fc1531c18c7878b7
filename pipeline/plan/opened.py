"""Base and experts, as far as merging needs to know them: what headers and configs say, without a network."""

from collections.abc import Mapping
from dataclasses import dataclass

from sensmerge.pipeline.plan.seen import Tokenizer
from sensmerge.tasks.checkpoints.weights import BaseWeights, ExpertWeights


@dataclass(frozen=True)
class OwnHead:
    """The head of an expert, which merged models have beside them."""

    config: str
    """JSON of the config of its network; it is loaded in the dtype of the merged trunk, not the expert's"""
    network: str
    """name of the class of its network"""
    base_config: bool
    """whether the expert runs with the base's settings"""


@dataclass(frozen=True)
class Opened:
    """Base and experts, matched tensor by tensor."""

    base: BaseWeights
    """a `Base` where classes of transformers have read all models just now"""
    experts: Mapping[str, ExpertWeights]
    """each an `Expert` then"""
    tokenizer: Tokenizer
    """that all of them use, or merged models alone where there are no networks"""
    notes: tuple[str, ...]
    """what a user should know of them: a line each"""
    about_tokenizer: tuple[str, ...]
    """what a user should know of it: a line each"""
    by_name: bool
    """whether tensors are matched by name, by no class of transformers; then there are no networks"""
    heads: Mapping[str, OwnHead]
    """of the experts that have a head of their own"""
    classes: tuple[str, ...]
    """what the experts call the classes of a base that does not name them"""
