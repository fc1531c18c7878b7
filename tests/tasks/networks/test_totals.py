"""Gram and fisher of real networks: which tensor gets which total, and what is known of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.checkpoints.weights import View
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.linear import LinearWeight
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.totals import SharedInputs, Totals
from sensmerge.tasks.networks.watching import Watch
from sensmerge.tasks.statistics.fisher import Fisher
from sensmerge.tasks.statistics.gram import Gram
from sensmerge.tasks.statistics.statistic import TENSORS, Statistic, index, read_input_dim, read_tensor, read_tokens
from tests.conftest import llama_config, make_gpt2, make_llama, perturbed

Save = Callable[..., Path]
SAMPLES = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    for ids in (torch.randint(3, 250, (1, length), generator=torch.manual_seed(0)) for length in (5, 9, 3, 30))
]
TOKENS = 47


def make_mixtral() -> PreTrainedModel:
    settings = llama_config().to_dict() | {"num_local_experts": 3, "num_experts_per_tok": 2, "model_type": "mixtral"}
    return MixtralForCausalLM(MixtralConfig(**settings))


MAKE = {"llama": make_llama, "gpt2": make_gpt2, "mixtral": make_mixtral}


def source_of(name: str, save: Save, folder: Path, dtype: torch.dtype = torch.float32) -> Source:
    torch.manual_seed(0)
    network = MAKE[name]()
    base, expert = save(network, "base", folder), save(perturbed(network, 1), "math", folder)
    return Source(base, expert, "experts.math", "causal_lm", dtype, "cpu")


def measured(source: Source, placement: Placement, folder: Path) -> Path:
    """An artifact with both statistics."""
    folder.mkdir()
    statistics = {"gram": Gram(), "fisher": Fisher()}
    with open_runner(source, placement, folder, statistics) as runner:
        assert len(dict(runner.run(SAMPLES, lambda *_: None))) == len(SAMPLES)
    for name in statistics:
        write_json(folder / f"{name}.json", {"tokens": TOKENS, TENSORS: index(folder, name)})
    return folder


def plain(source: Source) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Gram and fisher by parameter, float64, and the dimension of inputs, by hooks of our own."""
    network = AutoModelForCausalLM.from_pretrained(source.folder, experts_implementation="eager").double().eval()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    gram: dict[str, Tensor] = {}
    dims = {}

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, name = inputs[0].detach().flatten(0, -2), names[id(module.weight)]
        gram[name] = gram.get(name, 0) + torch.einsum("ti,tj->ij", x, x)
        dims[name] = 0 if isinstance(module, Conv1D) else 1

    for module in network.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(see)
    fisher = {name: torch.zeros_like(one) for name, one in network.named_parameters()}
    for sample in SAMPLES:
        network.zero_grad()
        network(**sample).loss.backward()
        for name, parameter in network.named_parameters():
            fisher[name] += 0 if parameter.grad is None else parameter.grad.square()
    return gram, fisher, dims


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_of_language_models(name: str, placement: Placement, save: Save, tmp_path: Path) -> None:
    source = source_of(name, save, tmp_path)
    artifact = measured(source, placement, tmp_path / "out")
    gram, fisher, dims = plain(source)
    tensors = source.expert.base.weights
    for tensor in tensors:
        found = read_tensor(artifact, "gram", tensor)
        if tensor not in gram:
            assert found is None
            assert read_input_dim(artifact, "gram", tensor) is None
            assert read_tokens(artifact, "gram", tensor) == 0
            continue
        assert found is not None
        torch.testing.assert_close(found.double(), gram[tensor], rtol=1e-5, atol=1e-4)
        assert read_input_dim(artifact, "gram", tensor) == dims[tensor]
        assert source.expert.base.info(tensor).shape[dims[tensor]] == len(found)
        assert read_tokens(artifact, "gram", tensor) == TOKENS
    for tensor in tensors:
        squares = read_tensor(artifact, "fisher", tensor)
        assert squares is not None
        assert squares.dtype == torch.float32
        torch.testing.assert_close(squares.double(), fisher[tensor], rtol=1e-3, atol=1e-10)
        assert read_tokens(artifact, "fisher", tensor) == TOKENS
        assert read_input_dim(artifact, "fisher", tensor) is None


def test_layers_with_the_same_inputs_share_a_matrix(save: Save, tmp_path: Path) -> None:
    source = source_of("llama", save, tmp_path)
    places = index(measured(source, "whole", tmp_path / "out"), "gram")
    kept: dict[str, list[str]] = {}
    for tensor, place in places.items():
        if tensor.startswith("model.layers.1."):
            kept.setdefault(place["key"], []).append(tensor.split(".")[-2])
    assert sorted(map(sorted, kept.values())) == [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_all_placements(dtype: torch.dtype, save: Save, tmp_path: Path) -> None:
    source = source_of("llama", save, tmp_path, dtype)
    whole, streamed = (measured(source, one, tmp_path / one) for one in ("whole", "streamed"))
    for tensor, place in index(whole, "gram").items():
        found, expected = (read_tensor(one, "gram", tensor) for one in (streamed, whole))
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
        assert place["tokens"] == TOKENS


@pytest.mark.parametrize("placement", ["whole", "streamed"])
def test_a_stacked_parameters_gradients_are_told_apart(placement: Placement, save: Save, tmp_path: Path) -> None:
    """A checkpoint of Mixtral has a tensor for each matrix of each expert, which transformers stacks."""
    source = source_of("mixtral", save, tmp_path)
    artifact = measured(source, placement, tmp_path / "out")
    _, fisher, _ = plain(source)
    for tensor in source.expert.base.weights:
        (parameter,) = source.expert.base.names.all_parameters(tensor)
        expected = fisher[source.expert.base.names.spelled(parameter)]
        parts = source.parts(source.expert.base.names.spelled(parameter))
        assert parts is not None
        found = read_tensor(artifact, "fisher", tensor)
        assert found is not None
        assert found.shape == source.expert.base.info(tensor).shape
        torch.testing.assert_close(found.double(), parts[tensor].of(expected), rtol=1e-3, atol=1e-10)


def routed(source: Source) -> dict[str, tuple[Tensor, int]]:
    """Gram and number of tokens of Mixtral's router and experts by tensor, float64, from what the experts are given."""
    network = AutoModelForCausalLM.from_pretrained(source.folder, experts_implementation="eager").double().eval()
    found: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, rows: Tensor) -> None:
        total, count = found.get(name, (0, 0))
        found[name] = total + torch.einsum("ti,tj->ij", rows, rows), count + len(rows)

    for number, block in enumerate(network.model.layers):
        prefix = f"model.layers.{number}.mlp"

        def see(experts: nn.Module, given: tuple[Tensor, ...], prefix: str = prefix) -> None:
            hidden, chosen, _ = given
            add(f"{prefix}.gate.weight", hidden)
            for one in range(experts.num_experts):
                rows = hidden[(chosen == one).any(-1)]
                gate, up = (rows @ experts.gate_up_proj[one].T).chunk(2, -1)
                if len(rows):
                    add(f"{prefix}.experts.gate_up_proj[{one}]", rows)
                    add(f"{prefix}.experts.down_proj[{one}]", nn.functional.silu(gate) * up)

        block.mlp.experts.register_forward_pre_hook(see)
    with torch.no_grad():
        for sample in SAMPLES:
            network(**sample)
    return found


@pytest.mark.parametrize("placement", ["whole", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_expert_of_a_mixture_has_the_inputs_routed_to_it(
    placement: Placement, dtype: torch.dtype, save: Save, tmp_path: Path
) -> None:
    source = source_of("mixtral", save, tmp_path, dtype)
    folder = tmp_path / "out"
    folder.mkdir()
    with open_runner(source, placement, folder, {"gram": Gram()}) as runner:  # without a way back
        dict(runner.run(SAMPLES, lambda *_: None))
    write_json(folder / "gram.json", {"tokens": TOKENS, TENSORS: index(folder, "gram")})
    part = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
    expected = routed(source)
    places = index(folder, "gram")
    seen = 0
    for tensor in source.expert.base.weights:
        if ".block_sparse_moe." not in tensor:
            continue
        name = tensor.replace("block_sparse_moe", "mlp")
        if ".experts." in name:
            start, expert, matrix, _ = name.rsplit(".", 3)
            name = f"{start}.{part[matrix]}[{expert}]"
        if name not in expected:
            assert read_tensor(folder, "gram", tensor) is None
            continue
        gram, count = expected[name]
        seen += 1
        assert read_input_dim(folder, "gram", tensor) == 1
        assert source.expert.base.info(tensor).shape[1] == len(gram)
        if dtype == torch.float32:  # in another one, a token may take another way
            assert read_tokens(folder, "gram", tensor) == count
            torch.testing.assert_close(read_tensor(folder, "gram", tensor).double(), gram, rtol=1e-4, atol=1e-4)
        if tensor.endswith("w1.weight"):
            assert places[tensor] == places[tensor.replace("w1", "w3")]
    assert seen > 8


def strided(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> View:
    return View(shape, stride, offset)


def test_which_tensors_are_rows_of_a_weight() -> None:
    weight = LinearWeight("w", strided((6, 4), (4, 1)))
    parts = {
        "all": strided((6, 4), (4, 1)),
        "last two rows": strided((2, 4), (4, 1), 16),
        "two rows, transposed": strided((4, 2), (1, 4), 8),
    }
    assert weight.input_dims(parts) == {"all": 1, "last two rows": 1, "two rows, transposed": 0}
    others = {
        "columns": strided((6, 2), (4, 1), 2),
        "every other row": strided((3, 4), (8, 1)),
        "rows behind": strided((2, 4), (4, 1), 24),
        "across": strided((2, 4), (4, 1), 3),
        "stacked": strided((1, 6, 4), (24, 4, 1)),
    }
    assert weight.input_dims(others) == {}
    assert weight.input_dims(None) == {}
    transposed = LinearWeight("w", strided((6, 4), (1, 6)))  # as GPT-2 holds it
    assert transposed.input_dims({"all": strided((4, 6), (6, 1))}) == {"all": 0}
    second = LinearWeight("w", strided((3, 4), (4, 1), 12))  # of two that one parameter holds
    assert second.input_dims(parts) == {"last two rows": 1}


class Two(nn.Module):
    """Two layers that are given the same inputs, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, inputs: Tensor, mode: str) -> None:
        self.first(inputs)
        if mode == "changed":
            inputs += 1
        if mode != "once":
            self.second(inputs.clone() if mode == "another" else inputs)


@pytest.fixture
def two(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Two, Watch]:
    source = source_of("llama", save, tmp_path)
    monkeypatch.setattr(Source, "layer", lambda *_: "layer")
    monkeypatch.setattr(Source, "parts", lambda _, name: {name: strided((2, 3), (3, 1))})
    network = Two()
    return network, Watch({"gram": Gram()}, source, network)


def run(two: tuple[Two, Watch], modes: list[str], folder: Path) -> None:
    network, watch = two
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), watch.inputs():
        for mode in modes:
            network(torch.randn(4, 3, generator=generator), mode)
    watch.write(folder, "two")


@pytest.mark.parametrize(
    ("modes", "matrices"), [(["same", "same"], 1), (["another", "same"], 2), (["changed"], 2), (["once", "same"], 2)]
)
def test_sharing_is_found(modes: list[str], matrices: int, two: tuple[Two, Watch], tmp_path: Path) -> None:
    run(two, modes, tmp_path)
    places = index(tmp_path, "gram")
    assert places.keys() == {"first.weight", "second.weight"}
    assert len({place["key"] for place in places.values()}) == matrices
    expected = {"first.weight": 4 * len(modes), "second.weight": 4 * len([one for one in modes if one != "once"])}
    assert {tensor: place["tokens"] for tensor, place in places.items()} == expected


@pytest.mark.parametrize("later", ["another", "changed", "once"])
def test_sharing_is_never_assumed(later: str, two: tuple[Two, Watch], tmp_path: Path) -> None:
    message = r"^experts\.math: second\.weight is given the inputs of first\.weight in some samples and not in others"
    with pytest.raises(InputError, match=message):
        run(two, ["same", later], tmp_path)


def test_one_layer_leads(save: Save, tmp_path: Path) -> None:
    shared = SharedInputs(source_of("llama", save, tmp_path))
    one, other = torch.zeros(2), torch.zeros(2)
    given = [("a", one), ("b", one), ("c", other), ("d", one), ("a", other), ("b", other)]
    assert [shared.leader(*call) for call in given] == ["a", "a", "c", "a", "a", "a"]
    with pytest.raises(InputError, match=r"^experts\.math: d is given the inputs of a in some samples"):
        shared.check()


@dataclass(frozen=True)
class Given(Statistic):
    """Σ of the inputs as they are."""

    hook = "inputs"
    by = "tensor"

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        """See `Statistic`."""
        return seen


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(bad: float | None, save: Save, tmp_path: Path) -> None:
    """Numbers whose sum is too large for their dtype are no error."""
    totals = Totals("given", Given(), source_of("llama", save, tmp_path))
    inputs = torch.full((3, 4), 3e38)
    if bad is not None:
        inputs[1, 2] = bad
    totals.has_inputs_of("a", {"a.weight": 1})
    totals.add_inputs("a", inputs, inputs)
    if bad is None:
        totals.write(tmp_path, "a")
        assert index(tmp_path, "given")["a.weight"]["tokens"] == 3
        return
    with pytest.raises(InputError, match=r"^experts\.math: given of tensor a\.weight is not finite; try dtype"):
        totals.write(tmp_path, "a")
