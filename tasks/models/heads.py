"""Heads without their trunk: what follows a trunk, run on what a trunk gave."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from tasks.errors import InputError
from tasks.models.networks import load_config, skeleton
from tasks.models.source import Source
from tasks.models.weights import HEAD_WEIGHTS


@dataclass(frozen=True)
class SavedHead:
    """An expert's head in a folder of its own, as stage merge writes it."""

    folder: Path

    @property
    def config(self) -> PretrainedConfig:
        """Config of the network that ends in the head."""
        return load_config(self.folder)

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """Return the head's tensors by parameter name."""
        tensors: dict[str, torch.Tensor] = load_file(self.folder / HEAD_WEIGHTS)
        return tensors


@dataclass
class TrunkOutput(BaseModelOutputWithPoolingAndCrossAttentions):  # type: ignore[misc]
    """What heads look for in the output of a trunk."""

    router_logits: None = None
    """of mixtures of experts; only their training needs it"""


class DetachedHead:
    """The head of a network whose trunk is dropped; the network's own code runs, on what a trunk gave before."""

    def __init__(self, network: PreTrainedModel) -> None:
        """Take a network and drop its trunk."""
        self.network = network
        self._replay = _Replay()
        setattr(network, network.base_model_prefix, self._replay)

    @classmethod
    def load(cls, saved: SavedHead, dtype: torch.dtype, device: str) -> "DetachedHead":
        """Load a saved head, without a trunk.

        Raises:
            InputError: the tensors are not those of the head.
        """
        network = skeleton(saved.config, "classification", saved.folder)
        head = cls(network)
        tensors = {name: tensor.to(device, dtype) for name, tensor in saved.head_tensors().items()}
        missing = set(dict(network.named_parameters())) ^ set(tensors)
        if missing:
            raise InputError(f"{saved.folder}: no fitting weights for {', '.join(sorted(missing))}; merge again")
        network.load_state_dict(tensors, assign=True)
        network.eval()
        return head

    @classmethod
    def read(cls, source: Source) -> "DetachedHead":
        """Load the head of an expert's network from its checkpoint, without the trunk.

        Raises:
            InputError: parameters are left without weights.
        """
        network = source.hollow()
        # Of names of one parameter the first counts: checkpoints have a tied one in the trunk.
        names = {id(one): name for name, one in reversed(network.state_dict(keep_vars=True).items())}
        head = cls(network)
        source.load(network, "", names)
        return head

    def logits(
        self, hidden: torch.Tensor, pooled: torch.Tensor | None, inputs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the logits, float32.

        Args:
            hidden: last hidden state of a trunk, (B, T, width).
            pooled: its pooler's output, (B, width), where it has one.
            inputs: what the trunk was given; some heads look for the last token in it.
        """
        self._replay.output = TrunkOutput(last_hidden_state=hidden, pooler_output=pooled)
        logits: torch.Tensor = self.network(**inputs).logits
        return logits.float()


class _Replay(nn.Module):
    """Stands in for a trunk."""

    output: TrunkOutput

    def forward(self, *_: object, **__: object) -> TrunkOutput:
        return self.output
