"""Any set of statistics in one pass: sums by layer and totals by tensor, of gradients and of inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.sharded import _Lane
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.watching import Watch
from sensmerge.tasks.statistics.fisher import Fisher
from sensmerge.tasks.statistics.gram import Gram
from sensmerge.tasks.statistics.sensitivity import Sensitivity
from sensmerge.tasks.statistics.statistic import Statistic, index
from tests.conftest import make_gpt2, make_llama, perturbed

Save = Callable[..., Path]
SAMPLES = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    for ids in (torch.randint(3, 250, (1, length), generator=torch.manual_seed(0)) for length in (5, 9, 3, 7))
]


@dataclass(frozen=True)
class Outer(Statistic):
    """Σ x xᵀ of the inputs of every linear layer."""

    hook = "inputs"
    by = "tensor"

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return seen.double().T @ seen.double()


@dataclass(frozen=True)
class Squares(Statistic):
    """Σ (∂L/∂p)² of every parameter."""

    hook = "gradients"
    by = "tensor"

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return seen.double().square()


@dataclass(frozen=True)
class Activity(Statistic):
    """Σ |x| of all linear layers of a layer."""

    hook = "inputs"
    by = "layer"

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return seen.double().abs().sum()


ALL = {
    "outer": Outer(),
    "squares": Squares(),
    "activity": Activity(),
    "sensitivity": Sensitivity(),
    "gram": Gram(),
    "fisher": Fisher(),
}


@pytest.fixture(params=["llama", "gpt2"])
def network(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return make_llama() if request.param == "llama" else make_gpt2()


@pytest.fixture
def source(network: PreTrainedModel, save: Save, tmp_path: Path) -> Source:
    base, expert = save(network, "base", tmp_path), save(perturbed(network, 1), "math", tmp_path)
    return Source(base, expert, "experts.math", "causal_lm", torch.float32, "cpu")


def totals(folder: Path, name: str) -> dict[str, Tensor]:
    """All totals of a statistic that a runner has written, by tensor."""
    from safetensors.torch import load_file

    return {tensor: load_file(folder / one["file"])[one["key"]] for tensor, one in index(folder, name).items()}


def measured(source: Source, placement: Placement, folder: Path) -> dict[str, dict[str, Tensor]]:
    """What all statistics say: those by tensor as they are, those by layer added up in the order of the samples."""
    folder.mkdir()
    with open_runner(source, placement, folder, ALL) as runner:
        samples = dict(runner.run(SAMPLES, lambda *_: None))
    found = {name: totals(folder, name) for name in ("outer", "squares", "gram", "fisher")}
    for name in ("activity", "sensitivity"):
        sums = [samples[number].sums[name] for number in range(len(SAMPLES))]
        found[name] = {layer: torch.tensor(sum(one[layer] for one in sums), dtype=torch.float64) for layer in sums[0]}
    return found


def plain(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Outer and squares by hooks of our own on the whole network, by the parameters' names."""
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    found: dict[str, dict[str, Tensor]] = {"outer": {}, "squares": {}}

    def hook(name: str) -> Callable[..., None]:
        def see(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().flatten(0, -2)
            found["outer"][name] = found["outer"].get(name, 0) + torch.einsum("ti,tj->ij", x, x)

        return see

    named = {id(parameter): name for name, parameter in network.named_parameters()}
    for module in network.modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(hook(named[id(module.weight)]))
    for sample in SAMPLES:
        network.zero_grad()
        network(**sample).loss.backward()
        for name, parameter in network.named_parameters():
            found["squares"][name] = found["squares"].get(name, 0) + parameter.grad.double().square()
    return found


def same_bits(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for name, values in expected.items():
        assert found[name].keys() == values.keys()
        for key, tensor in values.items():
            assert torch.equal(found[name][key], tensor), (name, key)


def test_a_set_of_statistics_in_one_pass(source: Source, tmp_path: Path) -> None:
    expected, found = plain(source.folder), measured(source, "whole", tmp_path / "whole")
    for name, values in expected.items():
        assert len(found[name]) == len(values)
        for parameter, tensor in values.items():
            (ours,) = [one for key, one in found[name].items() if parameter.endswith(key)]
            torch.testing.assert_close(ours, tensor, rtol=1e-9, atol=1e-12)
    streamed = measured(source, "streamed", tmp_path / "streamed")
    for name in ("outer", "activity", "gram"):
        same_bits({name: streamed[name]}, {name: found[name]})
    for name in ("squares", "sensitivity", "fisher"):
        for key, tensor in found[name].items():
            torch.testing.assert_close(streamed[name][key], tensor, rtol=1e-5, atol=1e-9)
    # One file for each block, written when all samples have been in it.
    blocks = {f"{place}.safetensors" for place in source_blocks(source)}
    assert {path.name for path in (tmp_path / "streamed" / "outer").iterdir()} == blocks | {"shell.safetensors"}


def source_blocks(source: Source) -> list[str]:
    from sensmerge.tasks.networks.blocks import blocks_of

    return list(blocks_of(source.hollow()))


def test_inputs_alone_take_no_way_back(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain(source.folder)["outer"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("sensmerge.tasks.networks.blocks.Part.backward", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    for placement in ("whole", "streamed"):
        folder = tmp_path / placement
        folder.mkdir()
        with open_runner(source, placement, folder, {"outer": Outer()}) as runner:
            assert [number for number, _ in runner.run(SAMPLES, lambda *_: None)] == list(range(len(SAMPLES)))
        assert len(totals(folder, "outer")) == len(expected)


@dataclass(frozen=True)
class Last(Statistic):
    """The last input of every linear layer: `of` returns a part of what it is given."""

    hook = "inputs"
    by = "tensor"

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return seen[-1]


def test_totals_are_no_parts_of_what_is_seen(source: Source, tmp_path: Path) -> None:
    """Several layers have the same inputs, which no total may change."""
    found = {}
    for name, statistics in (("alone", {"last": Last()}), ("beside", {"last": Last(), "outer": Outer()})):
        (tmp_path / name).mkdir()
        with open_runner(source, "whole", tmp_path / name, statistics) as runner:
            list(runner.run(SAMPLES, lambda *_: None))
        found[name] = totals(tmp_path / name, "last")
    expected: dict[str, Tensor] = {}
    network = source.network()
    named = {id(parameter): name for name, parameter in network.named_parameters()}

    def see(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name = named[id(module.weight)]
        last = inputs[0].detach().flatten(0, -2)[-1]
        expected[name] = expected[name] + last if name in expected else last

    for module in network.modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(see)
    with torch.no_grad():
        for sample in SAMPLES:
            network(**sample)
    for one in found.values():
        assert len(one) == len(expected)
        for parameter, tensor in expected.items():
            (ours,) = [total for key, total in one.items() if parameter.endswith(key)]
            torch.testing.assert_close(ours, tensor)


def test_sums_by_layer_start_again(source: Source) -> None:
    network = source.network()
    watch = Watch({"sensitivity": Sensitivity()}, source, network)
    network(**SAMPLES[0]).loss.backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    first = watch.take()
    assert min(first["sensitivity"].values()) > 0
    assert watch.take() == {"sensitivity": dict.fromkeys(first["sensitivity"], 0.0)}
    network(**SAMPLES[0]).loss.backward()
    assert watch.take() == first


@pytest.mark.ray
@pytest.mark.parametrize("network", ["llama"], indirect=True)
def test_on_actors_and_after_one_died(
    source: Source, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two actors give the same bits as blocks that are streamed; with one that dies, every sample still counts once."""
    expected = measured(source, "streamed", tmp_path / "streamed")
    two = Actors(2, 0.5, 0)
    same_bits(measured(source, two, tmp_path / "two"), expected)
    receive, received = _Lane.receive, []

    def killing(lane: _Lane) -> object:
        received.append(lane)
        if len(received) == 12:
            ray.kill(lane._actor)
        return receive(lane)

    monkeypatch.setattr(_Lane, "receive", killing)
    same_bits(measured(source, two, tmp_path / "killed"), expected)
    assert len(received) > len(SAMPLES) * (3 + 2 * 2)
