"""Heads without their trunk: what follows a trunk, run on what a trunk gave."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sensmerge.tasks.checkpoints.weights import HEAD_WEIGHTS
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import Head, is_seq2seq, load_config, own_ending, skeleton, trunk_of
from sensmerge.tasks.networks.source import Source


@dataclass(frozen=True)
class SavedHead:
    """An expert's head in a folder of its own, as stage merge writes it."""

    folder: Path

    @property
    def config(self) -> PretrainedConfig:
        """Config of the network that ends in the head."""
        return load_config(self.folder)

    @property
    def ending(self) -> Head:
        """What that network ends in."""
        return own_ending(self.config.architectures or ())

    def head_tensors(self) -> dict[str, torch.Tensor]:
        """Return the head's tensors by parameter name."""
        tensors: dict[str, torch.Tensor] = load_file(self.folder / HEAD_WEIGHTS)
        return tensors


class TrunkOutput(BaseModelOutputWithPooling):  # type: ignore[misc]
    """What a trunk gave. All else that heads pass on of it (router logits, caches, hidden states of images) is None."""

    def __getattr__(self, name: str) -> None:
        """Return None for all that was not given."""
        if name.startswith("__"):
            raise AttributeError(name)


class DetachedHead:
    """The head of a network whose trunk is dropped; the network's own code runs, on what a trunk gave before.

    The trunk's modules stay with their settings, at which some heads look, but without weights.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        """Take a network and put a trunk without weights in the place of its own, which stays as it is."""
        self.network = network
        self._output = TrunkOutput()
        # Of an encoder-decoder that writes, the trunk may be no module of its own.
        parts = [network.get_encoder(), network.get_decoder()] if is_seq2seq(network) else [trunk_of(network)]
        for part in parts:
            place = next(name for name, module in network.named_modules() if module is part)
            hollow = _without_weights(part)
            # Of encoder-decoders, some heads call the decoder, not the wrapper that is their trunk.
            for module in {id(one): one for one in (hollow, getattr(hollow, "decoder", hollow))}.values():
                module.forward = self._replay
            network.set_submodule(place, hollow)

    def _replay(self, *_: object, **__: object) -> TrunkOutput:
        return self._output

    @classmethod
    def load(cls, saved: SavedHead, dtype: torch.dtype, device: str) -> "DetachedHead":
        """Load a saved head, without a trunk.

        Raises:
            InputError: the tensors are not those of the head.
        """
        network = skeleton(saved.config, saved.ending, saved.folder)
        head = cls(network)
        tensors = {name: tensor.to(device, dtype) for name, tensor in saved.head_tensors().items()}
        missing = set(dict(network.named_parameters())) ^ set(tensors)
        if missing:
            raise InputError(f"{saved.folder}: no fitting weights for {', '.join(sorted(missing))}; merge again")
        network.load_state_dict(tensors, strict=False, assign=True)  # norms of a batch add what they lack
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
            inputs: what the trunk was given; some heads look for the last token in it, and an encoder-decoder that
                writes takes nothing else of it but that there are labels.
        """
        self._output = TrunkOutput(last_hidden_state=hidden, pooler_output=pooled)
        logits: torch.Tensor = self.network(**inputs).logits
        return logits.float()


def _without_weights(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    copied._parameters, copied._buffers = {}, dict.fromkeys(module._buffers)
    copied._modules = {
        name: None if child is None else _without_weights(child) for name, child in module._modules.items()
    }
    return copied
