"""What a recipe will ask of a network, tried beforehand on a tiny stand-in: what is accepted must not fail after hours.

A stand-in has the class and the settings of the real network, but few and narrow layers with random weights. It is
saved, opened and run by the same code as the real one, and must give the same numbers in each way.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.features import FeatureCalibration
from sensmerge.tasks.networks.blocks import Batch, TrunkOutput
from sensmerge.tasks.networks.endings import OWN_HEADS
from sensmerge.tasks.networks.heads import DetachedHead
from sensmerge.tasks.networks.journeys import Measured, Runner
from sensmerge.tasks.networks.networks import Head, for_one_pass, skeleton
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.networks.readers import random_pictures, read_by
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.stand_in import stand_ins
from sensmerge.tasks.networks.walk import Traveller, Walk
from sensmerge.tasks.networks.watching import Statistics
from sensmerge.tasks.statistics.statistic import TENSORS, index, read_tensor

Result = TypeVar("Result")
TOLERANCE = 1e-3
"""Of float32 numbers of a tiny network that are worked out in two ways, relative."""


class StandIn:
    """A tiny network on disk, and what comes of it."""

    def __init__(self, network: PreTrainedModel, head: Head, folder: Path) -> None:
        """Save a network.

        Args:
            network: tiny.
            head: what it ends in.
            folder: an empty one.
        """
        self.name = type(network).__name__
        self._folder, self._network, self._batch = folder, network, _batch(network, head)
        # An encoder-decoder makes of labels what its decoder is given.
        self._inputs = self._batch if head == "seq2seq_lm" else _without_labels(self._batch)
        network.save_pretrained(folder / "model")
        self._source = Source(folder / "model", folder / "model", self.name, head, torch.float32, "cpu")

    def check_statistics(self, statistics: Statistics) -> None:
        """Check that the network has a loss, and that statistics can be made of its parameters, each in a layer.

        Raises:
            InputError: it is not so; without a recipe key.
        """
        self._try(f"its {', '.join(statistics)} cannot be measured", lambda: self._measured("whole", statistics))

    def check_head(self) -> None:
        """Check that the head gives on its trunk's output what it gives in the whole network.

        Raises:
            InputError: it does not; without a recipe key.
        """

        def compare() -> None:
            inputs = self._inputs
            output = self._trunk("whole")
            head = DetachedHead.read(self._source)
            with torch.no_grad():
                found = head.logits(output["hidden"], output.get("pooled"), inputs)
                expected = for_one_pass(self._source.network())(**inputs).logits.float()
            _same({"logits": found}, {"logits": expected})

        self._try("its head cannot be run apart from its trunk", compare)

    def check_parts(self, statistics: Statistics) -> None:
        """Check that the network gives the same in parts as whole.

        Args:
            statistics: of what it gives.

        Raises:
            InputError: it does not; without a recipe key.
        """

        def compare() -> None:
            parts, whole = self._measured("streamed", statistics), self._measured("whole", statistics)
            for name, found in whole.items():
                # Some totals are zero but for their rounding: those of gradients of keys' biases, for one.
                totals = found.values() if statistics[name].by == "tensor" else ()
                _same(parts[name], found, max((float(one.abs().max()) for one in totals), default=0.0))
            _same(self._trunk("streamed"), self._trunk("whole"))

        self._try("it cannot be run in parts", compare)

    def check_calibration(self) -> None:
        """Check that the network can be run in parts, and its blocks fitted to another's features.

        Raises:
            InputError: they cannot; without a recipe key.
        """
        self.check_parts({})
        model, states = self._source.folder, [self._folder / "before", self._folder / "behind"]

        def calibrate() -> None:
            task = Traveller("task", self._source, [self._batch], self._source.head in OWN_HEADS)
            walk = Walk([task], FeatureCalibration.model_validate({}), 1)
            walk.enter(model, states[0])
            for place in range(walk.blocks):
                for name, solved in walk.solve(place, model, states).items():
                    if not bool(solved.isfinite().all()):
                        raise ValueError(f"{name} is not finite")
                walk.advance(place, model, states)
                states.reverse()

        self._try("it cannot be calibrated", calibrate)

    def check_generation(self) -> None:
        """Check that the network generates.

        Raises:
            InputError: it does not; without a recipe key.
        """

        def generate() -> None:
            self._network.generate(**_without_labels(self._batch), max_new_tokens=2, do_sample=False)

        self._try("it cannot generate", generate)

    def _measured(self, placement: Placement, statistics: Statistics) -> dict[str, dict[str, Tensor]]:
        """Return what statistics say of a sample: sums by layer, totals by tensor."""

        def run(runner: Runner) -> Measured:
            return dict(runner.run([self._batch], lambda *_: None))[0]

        sums = self._with_runner(placement, run, statistics).sums
        found = {name: {layer: torch.tensor(one) for layer, one in by.items()} for name, by in sums.items()}
        for name, statistic in statistics.items():
            if statistic.by == "tensor":
                places = index(self._folder, name)
                write_json(self._folder / f"{name}.json", {TENSORS: places})
                totals = ((one, read_tensor(self._folder, name, one)) for one in places)
                found[name] = {one: total for one, total in totals if total is not None}
        return found

    def _trunk(self, placement: Placement) -> TrunkOutput:
        with torch.no_grad():
            return self._with_runner(placement, lambda runner: dict(runner.trunk_outputs([self._inputs]))[0])

    def _with_runner(
        self, placement: Placement, run: Callable[[Runner], Result], statistics: Statistics | None = None
    ) -> Result:
        with open_runner(self._source, placement, self._folder, statistics) as runner:
            return run(runner)

    def _try(self, what: str, check: Callable[[], object]) -> None:
        try:
            with _quiet():
                check()
        except Exception as error:  # a network that is not made for this may raise anything
            reason = _one_line(error).removeprefix(f"{self._source.base}: ")
            raise InputError(f"{self.name}: {what} ({reason})") from error


def stand_in(config: PretrainedConfig, head: Head, folder: Path, scratch: Path) -> StandIn | None:
    """Return a stand-in of the network of a config; None where none can be made so small.

    Args:
        config: of the model.
        head: what the network ends in.
        folder: of the model, for messages.
        scratch: an empty folder.

    Raises:
        InputError: the network takes no such sample alone, or has no loss on it; without a recipe key.
    """
    whole = skeleton(config, head, folder)
    with _quiet():
        for network, is_whole in stand_ins(config, whole):
            try:
                for_one_pass(network.requires_grad_())(**_batch(network, head)).loss.backward()
            except Exception as error:  # a network that is not made for this may raise anything
                if is_whole:
                    raise InputError(
                        f"{type(network).__name__}: it has no loss on {_alone(network)} ({_one_line(error)})"
                    ) from error
                continue
            network.zero_grad()
            return StandIn(network, head, scratch)
    # On the meta device the real one can tell whether it takes such inputs, but for what depends on values.
    reason = _refusal(whole, head)
    if reason:
        raise InputError(f"{type(whole).__name__}: it has no loss on {_alone(whole)} ({reason})")
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Have transformers say nothing of tiny networks."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _alone(network: PreTrainedModel) -> str:
    return "pictures alone" if read_by(network) == "pictures" else "text alone"


def _refusal(network: PreTrainedModel, head: Head) -> str:
    """Return why a network on the meta device takes no text; empty if that cannot be told there."""
    try:
        batch = {name: tensor.to("meta") for name, tensor in _batch(network, head).items()}
        for_one_pass(network)(**batch).loss.backward()
    except Exception as error:
        reason = _one_line(error)
        return "" if isinstance(error, NotImplementedError) or "meta" in reason else reason
    return ""


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    # Of our own messages, the way out is said elsewhere.
    return said.partition("; ")[0] if isinstance(error, InputError) else said[:300]


def _batch(network: PreTrainedModel, head: Head) -> Batch:
    """Return a sample; a text ends with an end token, at which some heads look."""
    if read_by(network) == "pictures":
        pictures = random_pictures(network.config, 1, torch.Generator().manual_seed(0))
        return {**pictures, "labels": torch.tensor([0])}
    text = network.config.get_text_config()
    end = getattr(text, "eos_token_id", None)
    end = end if isinstance(end, int) and end < getattr(text, "vocab_size", 0) else 9
    ids = torch.tensor([[5, 6, 7, 8, end]])
    labels = {
        "classification": torch.tensor([0.5 if network.config.num_labels == 1 else 0]),
        "token_classification": torch.zeros_like(ids),
        "seq2seq_lm": torch.tensor([[8, 7, end]]),
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.get(head, ids.clone())}


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], scale: float = 0.0) -> None:
    """Check that tensors are the same, up to `TOLERANCE` of their values or of a scale; of each one's largest if 0."""
    if found.keys() != expected.keys():
        raise ValueError(f"it gives {', '.join(sorted(found.keys() ^ expected.keys())[:3])} in one way only")
    for name, values in expected.items():
        largest = scale or float(values.abs().max())
        if not torch.allclose(found[name], values, rtol=TOLERANCE, atol=TOLERANCE * largest):
            raise ValueError(f"{name} differs")
