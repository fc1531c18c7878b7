"""Static merges of the census, against float64 and plain transformers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sensmerge.tasks.errors import InputError
from tests.census.cases import Case, do, statistics
from tests.merged import assert_loads, loading_problems
from tests.tasks.methods.test_spectral import naive_iso

TOLERANCE = 1e-5
"""Of float32 weights, in parts of a tensor's largest."""
WEIGHT = 0.4
Tensors = dict[str, Tensor]


def _task_arithmetic(deltas: Sequence[Tensor]) -> Tensor:
    return WEIGHT * sum(deltas)


def _iso_c(deltas: Sequence[Tensor]) -> Tensor:
    if deltas[0].ndim == 2 and min(deltas[0].shape) >= len(deltas):
        return naive_iso(deltas, [WEIGHT] * len(deltas))
    return WEIGHT * sum(deltas) / len(deltas)


METHODS: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = {"task_arithmetic": _task_arithmetic, "iso_c": _iso_c}
"""A method of elements and one of whole matrices: what each adds to a tensor, by the experts' task vectors."""


def merges(case: Case) -> str:
    """Merged weights, tensor by tensor."""
    try:
        folders = _merged(case)
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    wrong = [f"{method}: {said}" for method, folder in folders.items() if (said := _compare(case, method, folder))]
    return f"wrong: {wrong[0]}" if wrong else "right"


def loads(case: Case) -> str:
    """Merged folders in plain transformers: no key is missing, unexpected or of another shape, and no file is lost."""
    for folder in _merged(case).values():
        for problem, names in loading_problems(folder).items():
            if names:
                return f"wrong: {problem} {', '.join(sorted(names)[:3])}"
        assert_loads(folder, case.base)
    return "right"


@cache
def _merged(case: Case) -> dict[str, Path]:
    """Merge by all `METHODS` and return the folders."""
    recipe = case.static_recipe({method: {"method": method, "weight": WEIGHT} for method in METHODS})
    models = do(case.plan(recipe, "static")).models()
    return {method: models[method] for method in METHODS}


def _compare(case: Case, method: str, folder: Path) -> str:
    """Return what is wrong with merged weights; nothing if they are right."""
    base, found, network = _tensors(case.base), _tensors(folder), case.network(case.base)
    experts = [_tensors(one) for one in case.experts("full").values()]
    means, prefix = _saved_statistics(case, network), f"{network.base_model_prefix}." if case.classifies else ""
    if base.keys() != found.keys():
        return f"has other tensors: {', '.join(sorted(base.keys() ^ found.keys())[:3])}"
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            expected = tensor
        else:
            start = tensor.double()
            # A classifier may lack what only other heads read, such as a pooler.
            deltas = [one.get(prefix + name, tensor).double() - start for one in experts]
            expected = start + (sum(deltas) / len(deltas) if name in means else METHODS[method](deltas))
        off = float((found[name].double() - expected.double()).abs().max())
        if off > TOLERANCE * float(expected.abs().max()):
            return f"{name} is off by {off:.1e}"
    return ""


def _saved_statistics(case: Case, network: PreTrainedModel) -> set[str]:
    """Return the names under which transformers saves a network's statistics: they are saved as a number."""
    marked, mark, folder = copy.deepcopy(network), 12345.0, case.folder / "marked"
    for name in statistics(marked):
        marked.get_buffer(name).fill_(mark)
    marked.save_pretrained(folder)
    return {name for name, tensor in _tensors(folder).items() if bool((tensor == mark).all())}


def _tensors(folder: Path) -> Tensors:
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}
