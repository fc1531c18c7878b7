"""Every method that reads no statistics, from the experts' folders to a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sensmerge.tasks.checkpoints.weights import layer_groups
from sensmerge.tasks.coefficients import ExplicitCoefficients, UniformCoefficients
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.contract import METHODS, TaskVector
from sensmerge.tasks.methods.kernels.delta import Difference
from sensmerge.tasks.stages.merge import MergeJob
from tests.conftest import make_adapter, make_llama, perturbed
from tests.tasks.methods.pieces import whole_tensor
from tests.tasks.stages.test_merge import equal, make_job, merged, weights_of
from tests.tasks.stages.test_merge_vectors import sens
from tests.tasks.stages.test_task_vectors import altered, poison

SETTINGS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "della": {"density": 0.4},
    "della_linear": {"density": 0.4},
    "sce": {"select_topk": 0.3},
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.01},
    "passthrough": {"scale": 0.5},
    "model_stock": {"filter_wise": True},
    "nuslerp": {"nuslerp_flatten": False},
}
NAMES = [name for name, method in METHODS.items() if not method.statistics]
Make = Callable[..., MergeJob]


def experts_of(name: str, *folders: tuple[str, Path]) -> dict[str, Path]:
    return dict(folders[: METHODS[name].most_experts])


@pytest.fixture
def job(llamas: dict[str, Path], tmp_path: Path) -> Make:
    def make(name: str, **changes: Any) -> MergeJob:
        experts = experts_of(name, ("math", llamas["math"]), ("code", llamas["code"]))
        weight = 1.0 if METHODS[name].no_weights else 0.4
        return make_job(tmp_path, llamas["base"], experts, name, SETTINGS.get(name), weight=weight, **changes)

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_what_the_method_makes_of_each_tensor(name: str, job: Make, tmp_path: Path) -> None:
    one = job(name)
    merged(one, tmp_path / "out")
    base, found = weights_of(one.base.folder), weights_of(tmp_path / "out")
    tuned = {key: weights_of(expert.folder) for key, expert in one.experts.items()}
    for tensor, origin in base.items():
        vectors = [
            TaskVector(key, tensor, Difference(own[tensor].flatten()), one.weight, shape=tuple(origin.shape))
            for key, own in tuned.items()
        ]
        assert torch.equal(found[tensor], whole_tensor(origin, vectors, one.method))
    assert not equal(found, base)


@pytest.mark.parametrize("name", NAMES)
def test_how_layers_are_grouped_changes_no_bit(name: str, job: Make, tmp_path: Path) -> None:
    one = job(name)
    merged(replace(one, groups=layer_groups(one.base, 1)), tmp_path / "many")
    merged(replace(one, groups=layer_groups(one.base, 10**9)), tmp_path / "one")
    assert equal(weights_of(tmp_path / "many"), weights_of(tmp_path / "one"))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_none_are_refused_by_name(
    name: str, llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    tensor = "model.layers.1.mlp.up_proj.weight"
    bad = altered(save(perturbed(make_llama(), 1), "bad", tmp_path), {tensor: poison(float("nan"), 2)})
    experts = experts_of(name, ("bad", bad), ("code", llamas["code"]))
    one = make_job(tmp_path, llamas["base"], experts, name, SETTINGS.get(name), task_vectors={})
    with pytest.raises(InputError, match=rf"experts\.bad: .*{tensor}"):
        merged(one, tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_no_expert_changes_stay(
    name: str, llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    """But where the method scales whole models, as passthrough is set to here."""
    base = weights_of(llamas["base"])
    kept = [tensor for tensor in base if "mlp" in tensor]
    experts = {}
    for seed, key in enumerate(("math", "code"), 1):
        network = perturbed(make_llama(), seed)
        with torch.no_grad():
            for tensor in kept:
                network.get_parameter(tensor).copy_(base[tensor])
        experts[key] = save(network, key, tmp_path)
    given = experts_of(name, *experts.items())
    one = make_job(tmp_path, llamas["base"], given, name, SETTINGS.get(name), weight=1.0)
    merged(one, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    for tensor in kept:
        factor = 0.5 if name == "passthrough" else 1.0
        torch.testing.assert_close(found[tensor], factor * base[tensor], rtol=1e-6, atol=1e-7)
        assert one.method.changes_untouched or torch.equal(found[tensor], base[tensor])


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_merged_as_what_they_add_up_to(
    name: str, llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    adapters, whole = {}, {}
    for seed, key in enumerate(("math", "code"), 1):
        network = make_llama()
        adapters[key] = make_adapter(network, tmp_path / f"adapter-{key}", seed, target_modules=["q_proj", "up_proj"])
        added = make_job(tmp_path / key, llamas["base"], {key: adapters[key]}, "passthrough", weight=1.0)
        merged(added, tmp_path / f"whole-{key}")
        whole[key] = tmp_path / f"whole-{key}"
    found = []
    for kind, experts in (("adapters", adapters), ("whole", whole)):
        given = experts_of(name, *experts.items())
        one = make_job(tmp_path / kind, llamas["base"], given, name, SETTINGS.get(name), weight=1.0)
        merged(one, tmp_path / f"merged-{kind}")
        found.append(weights_of(tmp_path / f"merged-{kind}"))
    for tensor, values in found[0].items():
        close = (values - found[1][tensor]).abs() <= 1e-5
        # Rounding of δ may change which of two elements that are as good as equal is kept.
        assert close.double().mean() > 0.99 if name in ("sce", "arcee_fusion", "ram", "ramplus_tl") else close.all()


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"])
def test_sens_coefficients_are_the_weights_of_each_layer(name: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    experts = {key: llamas[key] for key in ("math", "code")}
    how = sens(tmp_path, llamas["base"], experts)
    one = make_job(tmp_path, llamas["base"], experts, name, SETTINGS.get(name), weight=0.4, **how)
    merged(one, tmp_path / "sens")
    by_expert = {key: {layer: row[key] / 0.4 for layer, row in one.weights().items()} for key in experts}
    coefficients = ExplicitCoefficients(kind="explicit", weights=by_expert)
    same = replace(one, coefficients=coefficients, statistics={}, distances=None)
    merged(same, tmp_path / "explicit")
    uniform = replace(same, coefficients=UniformCoefficients())
    merged(uniform, tmp_path / "uniform")
    by_sens, by_hand, plain = (weights_of(tmp_path / folder) for folder in ("sens", "explicit", "uniform"))
    for tensor, values in by_sens.items():
        torch.testing.assert_close(values, by_hand[tensor], rtol=0, atol=1e-6)
    assert any(not torch.allclose(values, plain[tensor], atol=1e-4) for tensor, values in by_sens.items())


def test_the_base_may_be_one_of_the_models_that_are_averaged(llamas: dict[str, Path], tmp_path: Path) -> None:
    """As in a file of mergekit's that lists its base among the models."""
    one = make_job(tmp_path, llamas["base"], {"own": llamas["base"], "math": llamas["math"]}, "linear", weight=1.0)
    assert merged(one, tmp_path / "out")["unchanged"] == ["own"]
    base, math = weights_of(llamas["base"]), weights_of(llamas["math"])
    for tensor, values in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(values, (base[tensor] + math[tensor]) / 2)
