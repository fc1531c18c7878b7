import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sensmerge.pipeline.recipe.schema import Variant
from sensmerge.tasks.artifacts import Artifact, read_json, write_json
from sensmerge.tasks.coefficients import ExplicitCoefficients
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.methods.contract import TaskVector, method_of
from sensmerge.tasks.methods.kernels.delta import Unchanged, Whole
from sensmerge.tasks.methods.kernels.least_squares import Normal, reduced
from sensmerge.tasks.methods.remarks import remarks
from sensmerge.tasks.stages.merge import TENSORS, MergeJob
from tests.conftest import calibration_set, make_adapter, make_gpt2, perturbed, statistics_job
from tests.tasks.methods.pieces import whole_tensor
from tests.tasks.methods.totals import write_totals
from tests.tasks.stages.test_merge import make_job, merged, weights_of

OUT, IN = 7, 10
Make = Callable[..., list[TaskVector]]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE = randn(0, OUT, IN)
DELTAS = [randn(k + 1, OUT, IN) for k in range(3)]
INPUTS = [randn(k + 11, 40, IN) @ randn(k + 21, IN, IN) for k in range(3)]
"""What each expert's layer is given, (tokens, in), correlated."""


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes experts' task vectors from their deltas and inputs; None for an expert without a Gram matrix."""

    def made(
        deltas: Sequence[Tensor],
        inputs: Sequence[Tensor | None],
        weights: Sequence[float] | None = None,
        input_dim: int = 1,
    ) -> list[TaskVector]:
        vectors = []
        for k, (delta, rows) in enumerate(zip(deltas, inputs, strict=True)):
            totals = {} if rows is None else {"tensor": rows.T @ rows}
            count = 1 if rows is None else len(rows)
            statistics = write_totals(tmp_path / str(k), "gram", totals, count, {"tensor": input_dim}).folder
            weight = 1.0 if weights is None else weights[k]
            vectors.append(TaskVector(f"{k}", "tensor", Whole(delta.reshape(-1)), weight, statistics=statistics))
        return vectors

    return made


def regmean(base: Tensor, vectors: list[TaskVector], **settings: Any) -> Tensor:
    return whole_tensor(base, vectors, method_of({"method": "regmean", **settings}))


def naive(
    weights_of_experts: Sequence[Tensor], inputs: Sequence[Tensor], factor: float, shares: Sequence[float]
) -> Tensor:
    """Wᵀ = (Σ s Ĝ)⁻¹ Σ s Ĝ Wᵀ in float64, from the experts' whole weights."""
    left, right = torch.zeros(IN, IN).double(), torch.zeros(IN, OUT).double()
    for matrix, rows, share in zip(weights_of_experts, inputs, shares, strict=True):
        gram = rows.double().T @ rows.double() / len(rows)
        mask = torch.full((IN, IN), factor).double().fill_diagonal_(1)
        left += share * gram * mask
        right += share * (gram * mask) @ matrix.double().T
    return torch.linalg.solve(left, right).T


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 1.0])
def test_weight_one_is_regmean(factor: float, make: Make) -> None:
    merged = regmean(BASE, make(DELTAS, INPUTS), reduce=factor)
    expected = naive([BASE + delta for delta in DELTAS], INPUTS, factor, [1, 1, 1])
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_experts_errors_on_their_own_inputs_are_least(make: Make) -> None:
    """Without reduction nothing near the merge answers the experts' inputs better than it does."""

    def error(matrix: Tensor) -> float:
        both = zip(DELTAS, INPUTS, strict=True)
        return sum(float((rows.double() @ (matrix - BASE - d).double().T).square().mean()) for d, rows in both)

    merged = regmean(BASE, make(DELTAS, INPUTS), reduce=1.0)
    for seed in range(20):
        assert error(merged + 1e-2 * randn(seed, OUT, IN)) > error(merged)


def test_a_layer_that_can_be_solved_exactly_is(make: Make) -> None:
    """The inputs of experts span different directions, so one layer can be right for all of them."""
    inputs = [randn(k, 30, 3) @ torch.eye(IN)[3 * k : 3 * k + 3] for k in range(3)]
    vectors = make(DELTAS, inputs)
    with remarks() as said:
        merged = regmean(BASE, vectors)
    for rows, delta in zip(inputs, DELTAS, strict=True):
        torch.testing.assert_close(rows @ merged.T, rows @ (BASE + delta).T, rtol=1e-4, atol=1e-4)
    # Nobody knows anything of the last input.
    torch.testing.assert_close(merged[:, 9], (BASE + sum(DELTAS) / 3)[:, 9])
    assert said == ["some inputs are 0 in all calibration samples; the mean of the experts was taken there"]


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("factor", [0.9, 1.0])
def test_one_expert_is_itself(factor: float, tokens: int, make: Make) -> None:
    merged = regmean(BASE, make(DELTAS[:1], [INPUTS[0][:tokens]]), reduce=factor)
    torch.testing.assert_close(merged, BASE + DELTAS[0], rtol=1e-4, atol=1e-5)


def test_equal_experts_are_kept(make: Make) -> None:
    merged = regmean(BASE, make([DELTAS[0]] * 3, INPUTS, [0.5, 1.0, 1.5]))
    torch.testing.assert_close(merged, BASE + DELTAS[0], rtol=1e-4, atol=1e-5)


def test_order_of_experts_does_not_matter(make: Make) -> None:
    first = regmean(BASE, make(DELTAS, INPUTS))
    for order in itertools.permutations(range(3)):
        found = regmean(BASE, make([DELTAS[k] for k in order], [INPUTS[k] for k in order]))
        torch.testing.assert_close(found, first, rtol=1e-5, atol=1e-5)


def test_equal_isotropic_inputs_give_the_mean(make: Make) -> None:
    merged = regmean(BASE, make(DELTAS, [torch.eye(IN) * 3] * 3))
    torch.testing.assert_close(merged, BASE + sum(DELTAS) / 3)


def test_number_of_tokens_does_not_count(make: Make) -> None:
    once = regmean(BASE, make(DELTAS, INPUTS))
    torch.testing.assert_close(regmean(BASE, make(DELTAS, [INPUTS[0].repeat(5, 1), *INPUTS[1:]])), once)


def test_experts_that_hardly_use_a_layer_say_little(make: Make, tmp_path: Path) -> None:
    """A mixture routes 3 tokens of 12 samples to it, of another expert 60."""
    vectors = make(DELTAS[:2], INPUTS[:2])
    rows = [INPUTS[0][:3], INPUTS[1].repeat(3, 1)[:60]]
    for k, few in enumerate(rows):
        write_totals(tmp_path / f"{k}", "gram", {"tensor": few.T @ few}, len(few), samples=12)
    expected = naive([BASE + delta for delta in DELTAS[:2]], rows, 0.9, [3 / 12, 1])
    torch.testing.assert_close(regmean(BASE, vectors).double(), expected, rtol=1e-4, atol=1e-4)


def test_mean_weight_scales_and_the_rest_weighs_errors(make: Make) -> None:
    weights = [0.2, 0.4, 0.9]
    merged = regmean(BASE, make(DELTAS, INPUTS, weights))
    expected = BASE + 0.5 * (naive([BASE + delta for delta in DELTAS], INPUTS, 0.9, weights) - BASE)
    torch.testing.assert_close(merged.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_weights_of_zero_leave_the_base(make: Make) -> None:
    assert torch.equal(regmean(BASE, make(DELTAS, INPUTS, [0.0] * 3)), BASE)


def test_the_weight_scales_what_is_added(make: Make) -> None:
    assert method_of({"method": "regmean"}).scales_with_weight()
    once, twice = (regmean(BASE, make(DELTAS, INPUTS, [f * 0.3, f * 0.2, f * 0.4])) - BASE for f in (1, 2))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-5)


def test_an_expert_that_changed_nothing_wants_the_base(make: Make) -> None:
    vectors = make(DELTAS, INPUTS)
    vectors[2] = replace(vectors[2], delta=Unchanged(BASE.numel()))
    expected = naive([BASE + DELTAS[0], BASE + DELTAS[1], BASE], INPUTS, 0.9, [1, 1, 1])
    torch.testing.assert_close(regmean(BASE, vectors).double(), expected, rtol=1e-4, atol=1e-4)


def test_what_no_expert_changed_stays_and_is_not_remarked_upon(make: Make) -> None:
    with remarks() as said:
        merged = regmean(BASE, make([torch.zeros(OUT, IN)] * 3, [rows[:2] for rows in INPUTS]), reduce=1.0)
    assert torch.equal(merged, BASE)
    assert said == []


@pytest.mark.parametrize("input_dim", [0, 1])
def test_square_weights_may_be_stored_transposed(input_dim: int, make: Make) -> None:
    base, deltas = BASE[:, :OUT], [delta[:, :OUT] for delta in DELTAS]
    inputs = [rows[:, :OUT] for rows in INPUTS]
    upright = regmean(base, make(deltas, inputs))
    stored = (lambda matrix: matrix.T.contiguous()) if input_dim == 0 else (lambda matrix: matrix)
    found = regmean(stored(base), make([stored(delta) for delta in deltas], inputs, input_dim=input_dim))
    torch.testing.assert_close(stored(found), upright)


@pytest.mark.parametrize("input_dim", [0, 1])
def test_factors_give_what_their_product_does(input_dim: int, make: Make) -> None:
    pairs = [(randn(k, 2, IN), randn(k + 5, OUT, 2), 0.5 + k) for k in range(3)]
    if input_dim == 0:
        pairs = [(second.T, first.T, scaling) for first, second, scaling in pairs]
    deltas = [scaling * second @ first for first, second, scaling in pairs]
    base = BASE if input_dim == 1 else BASE.T.contiguous()
    inputs = [torch.cat([rows[:, :-1], 0 * rows[:, -1:]], 1) for rows in INPUTS]
    whole = make(deltas, inputs, input_dim=input_dim)
    low_rank = [
        replace(one, delta=Unchanged(0), factors=lambda pair=pair: pair) for one, pair in zip(whole, pairs, strict=True)
    ]
    torch.testing.assert_close(regmean(base, low_rank), regmean(base, whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("others", "divisor"), [("mean", 3), ("sum", 1)])
def test_tensors_without_gram_matrices(others: str, divisor: int, make: Make) -> None:
    weights = [0.2, 0.4, 0.9]
    merged = regmean(BASE, make(DELTAS, [None] * 3, weights), others=others)
    expected = BASE + sum(w * delta for w, delta in zip(weights, DELTAS, strict=True)) / divisor
    torch.testing.assert_close(merged, expected)


def test_experts_whose_samples_never_come_to_a_layer_have_no_say(make: Make) -> None:
    with remarks() as said:
        merged = regmean(BASE, make(DELTAS, [INPUTS[0], INPUTS[1], None]))
    torch.testing.assert_close(merged, regmean(BASE, make(DELTAS[:2], INPUTS[:2])))
    assert said == ["no calibration sample of some experts comes here, so the others alone decide"]


@pytest.mark.parametrize("tokens", [1, 3])
def test_singular_matrices_are_regularised_and_said_to_be(tokens: int, make: Make) -> None:
    few = [rows[:tokens] for rows in INPUTS]
    with remarks() as said:
        merged = regmean(BASE, make(DELTAS, few), reduce=1.0)
    expected = naive([BASE + delta for delta in DELTAS], few, 0.99, [1, 1, 1])
    torch.testing.assert_close(merged.double(), expected, rtol=1e-3, atol=1e-3)
    assert said == [
        "Gram matrices are singular, so their off-diagonal was multiplied by 0.99; set reduce below that, or take "
        "more calibration samples"
    ]
    with remarks() as said:
        regmean(BASE, make(DELTAS, few), reduce=0.9)
    assert said == []


def test_what_is_no_gram_matrix_is_refused(make: Make, tmp_path: Path) -> None:
    vectors = make(DELTAS, INPUTS)
    for k in range(3):
        write_totals(tmp_path / f"{k}", "gram", {"tensor": torch.eye(IN) - 5.0 * torch.eye(IN).roll(1, 0)})
    with pytest.raises(InputError, match=r"not positive definite with their off-diagonal multiplied by 0\.9; set"):
        regmean(BASE, vectors)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9])
def test_condition_is_that_of_the_scaled_matrix(condition: float) -> None:
    rotation = torch.linalg.qr(randn(0, 20, 20).double())[0]
    matrix = rotation * torch.logspace(0, -torch.tensor(condition).log10(), 20).double() @ rotation.T
    scales = torch.logspace(-8, 8, 20).double()
    assert Normal((matrix / 2 + matrix.T / 2) * scales[:, None] * scales).is_singular == (condition > 1e7)


def test_reduction_leaves_the_matrix_alone() -> None:
    gram = torch.ones(2, 2)
    assert reduced(gram, 0.5).tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert gram.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_settings() -> None:
    for settings in ({"reduce": 1.5}, {"reduce": -0.1}, {"others": "none"}):
        with pytest.raises(ValidationError):
            method_of({"method": "regmean", **settings})
    with pytest.raises(ValueError, match=r"found the weight -0\.5; regmean weighs squared errors"):
        method_of({"method": "regmean"}).check_weights([0.5, -0.5])
    with pytest.raises(ValidationError, match="method regmean has no application se"):
        Variant.model_validate({"method": "regmean", "application": {"kind": "se"}})


# In a whole merge -----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(llamas: dict[str, Path], tmp_path: Path) -> Callable[..., MergeJob]:
    """Makes jobs for the tiny Llamas, with Gram matrices of made-up inputs; the first layer has too few of them."""

    def made(reduce: float = 1.0, **changes: Any) -> MergeJob:
        experts = {name: llamas[name] for name in ("math", "code")}
        artifacts = {}
        for seed, name in enumerate(experts):
            totals = {}
            for key, tensor in weights_of(llamas["base"]).items():
                if "proj" in key:
                    rows = randn(seed, 5 if "layers.0" in key else 500, tensor.shape[1])
                    totals[key] = rows.T @ rows
            artifacts[name] = write_totals(tmp_path / f"statistics-{name}", "gram", totals)
        settings = {"reduce": reduce}
        return make_job(tmp_path, llamas["base"], experts, "regmean", settings, **{"statistics": artifacts} | changes)

    return made


def test_remarks_are_kept_by_tensor_and_taken_over(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    found = merged(job(), tmp_path / "out")
    ((text, tensors),) = found["remarks"].items()
    assert text.startswith("Gram matrices are singular")
    assert len(tensors) == 7
    assert all(name.startswith("model.layers.0.") for name in tensors)
    again = merged(job(previous=tmp_path / "out"), tmp_path / "again")
    assert again["taken_over"] == again["tensors"]
    assert again["remarks"] == found["remarks"]
    assert merged(job(0.9), tmp_path / "reduced")["remarks"] == {}


def test_a_merge_made_before_there_were_remarks_is_taken_over(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    merged(job(), tmp_path / "out")
    table = read_json(tmp_path / "out" / TENSORS)
    for entry in table.values():
        del entry["remarks"]
    write_json(tmp_path / "out" / TENSORS, table)
    assert merged(job(previous=tmp_path / "out"), tmp_path / "again")["remarks"] == {}


def test_other_statistics_of_one_expert_merge_all_anew(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    one = job()
    merged(one, tmp_path / "out")
    anew = {**one.statistics, "math": replace(one.statistics["math"], fingerprint="anew")}
    assert merged(job(previous=tmp_path / "out", statistics=anew), tmp_path / "other")["taken_over"] == 0


def test_number_of_threads_and_order_of_groups_change_nothing(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    before, digests = torch.get_num_threads(), set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        one, out = job(0.9), tmp_path / f"{threads}"
        for group in reversed(one.parts()) if threads == 2 else one.parts():
            torch.set_num_threads(threads)
            one.run(group, out)
        digests.add(one.finish(out)["digest"])
    torch.set_num_threads(before)
    assert len(digests) == 1


def test_negative_weights_name_their_layer(job: Callable[..., MergeJob], tmp_path: Path) -> None:
    weights: dict[str, Any] = {"math": 1.0, "code": {"*": 1.0, "model.layers.1": -0.5}}
    one = job(coefficients=ExplicitCoefficients(kind="explicit", weights=weights))
    with pytest.raises(InputError, match=r"layer model\.layers\.1: found the weight -0\.25; regmean weighs"):
        one.weights()


def test_a_network_of_transposed_weights_and_an_adapter(save: Callable[..., Path], tmp_path: Path) -> None:
    """From statistics as the stage takes them, against transformers' own network and naive least squares."""
    base = save(make_gpt2(), "base", tmp_path)
    experts = {
        "math": save(perturbed(make_gpt2(), 1), "math", tmp_path),
        "code": make_adapter(make_gpt2(), tmp_path / "code", 3, target_modules=["c_attn", "c_proj"]),
    }
    rows = {name: [{"prompt": f"{k}{name}", "completion": "xyz"} for k in range(5)] for name in experts}
    artifacts, inputs, whole = {}, dict[str, list[Tensor]](), {}
    for name, folder in experts.items():
        artifacts[name] = Artifact(name, tmp_path / f"gram-{name}")
        artifacts[name].folder.mkdir()
        calibration = calibration_set(CompletionTask(kind="completion"), rows[name], tmp_path / f"rows-{name}")
        statistics_job(base, folder, calibration, ["gram"]).finish(artifacts[name].folder)
        network: Any = AutoModelForCausalLM.from_pretrained(base if name == "code" else folder)
        if name == "code":
            network = PeftModel.from_pretrained(network, folder).merge_and_unload()
        whole[name] = {key: one.detach() for key, one in network.state_dict().items()}
        layer = network.transformer.h[1].attn.c_proj
        layer.register_forward_pre_hook(lambda _, seen, n=name: inputs.setdefault(n, []).append(seen[0].detach()[0]))
        for sample in calibration.samples(name, AutoTokenizer.from_pretrained(base), {}):
            network(input_ids=sample["input_ids"].reshape(1, -1))
    one = make_job(tmp_path, base, experts, "regmean", statistics=artifacts, weight=1.0)
    merged(one, tmp_path / "out")
    key = "transformer.h.1.attn.c_proj.weight"
    left = right = 0
    for name in experts:
        gram = torch.cat(inputs[name]).double()
        gram = gram.T @ gram / len(gram)
        gram = 0.9 * gram + 0.1 * torch.diag(gram.diagonal())
        left, right = left + gram, right + gram @ whole[name][key].double()
    expected = torch.linalg.solve(left, right)
    torch.testing.assert_close(weights_of(tmp_path / "out")[key].double(), expected, rtol=1e-3, atol=1e-5)
    norm = "transformer.h.1.ln_1.weight"
    mean = (whole["math"][norm] + whole["code"][norm]) / 2
    torch.testing.assert_close(weights_of(tmp_path / "out")[norm], mean)
