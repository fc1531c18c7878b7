"""Records what mergekit 0.1.5 makes of small random tensors, for the tests of our methods to compare with.

It needs an environment of its own: `pip install mergekit==0.1.5`, and then `python record_mergekit.py` beside this file
writes `mergekit.safetensors` anew. Recorded with torch 2.13.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.api import merge_tensors
from safetensors.torch import save_file

EXPERTS = 4
SHAPES = ((11, 7), (17,), (6, 2, 5))
SCALES = {"tuned": 0.02, "apart": 1.0, "sparse": 0.02}
"""Standard deviation of task vectors; a third of the elements of sparse ones is zero."""
WEIGHTS = [0.5, 0.3, 0.4, 0.2]
SPARSE = ("breadcrumbs", "breadcrumbs_ties")


def cases() -> Iterator[tuple[str, int, bool, dict[str, Any]]]:
    """Yield method, number of experts, whether there is a base, and parameters."""
    for count in (2, 4):
        for method in SPARSE:
            for density, gamma in ((0.6, 0.05), (0.9, 0.2), (0.3, 0.0), (1.0, 0.3)):
                for more in ({}, {"normalize": True, "rescale": True, "lambda": 0.7}):
                    yield method, count, True, {"weight": 1, "density": density, "gamma": gamma, **more}
        for method in ("della", "della_linear"):
            yield method, count, True, {"weight": 1, "density": 1.0}
        for top in (0.0, 0.2, 0.7, 1.0):
            yield "sce", count, True, {"select_topk": top}
        for by_filter in (False, True):
            yield "model_stock", count, True, {"filter_wise": by_filter}
        for base in (False, True):
            for normalize in (False, True):
                yield "multislerp", count, base, {"weight": 1, "normalize_weights": normalize}
        for steps in (1, 10):
            yield "karcher", count, False, {"max_iter": steps}
        for epsilon in (1e-5, 0.01):
            yield "ram", count, True, {"epsilon": epsilon}
            yield "ramplus_tl", count, True, {"epsilon": epsilon}
            yield "ramplus_tl", count, True, {"epsilon": epsilon, "r": 0.5, "alpha": 2.0}
    for base in (False, True):
        for flatten, row_wise in ((True, False), (False, False), (False, True)):
            yield "nuslerp", 2, base, {"weight": 1, "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    for t in (0.0, 0.25, 0.5, 1.0):
        yield "slerp", 1, True, {"t": t}
    for t in (0.0, 0.001, 0.1):
        yield "nearswap", 1, True, {"t": t}
    yield "arcee_fusion", 1, True, {}
    for scale in (None, 0.5):
        yield "passthrough", 1, False, {"scale": [scale]}


def main() -> None:
    """Write bases, experts, and what mergekit makes of them; the cases are in the file's metadata."""
    generator = torch.Generator().manual_seed(7)
    found, listed = {}, list(cases())
    for kind, scale in SCALES.items():
        for number, shape in enumerate(SHAPES):
            key = f"{kind}{number}"
            base = torch.randn(shape, generator=generator)
            deltas = [scale * torch.randn(shape, generator=generator) for _ in range(EXPERTS)]
            if kind == "sparse":
                deltas = [one * (torch.rand(shape, generator=generator) < 2 / 3) for one in deltas]
            experts = [base + delta for delta in deltas]
            found |= {f"{key}.base": base} | {f"{key}.expert{k}": one for k, one in enumerate(experts)}
            outputs = []
            for method, count, has_base, parameters in listed:
                given = {name: value for name, value in parameters.items() if name != "weight"}
                if "weight" in parameters:
                    given["weight"] = WEIGHTS[:count]
                models = [base] * has_base + experts[:count]
                outputs.append(merge_tensors(models, method, parameters=given, base_index=0 if has_base else None))
            found[f"{key}.merged"] = torch.stack(outputs)
    keys = ("method", "experts", "base", "parameters")
    metadata = {
        "cases": json.dumps([dict(zip(keys, one, strict=True)) for one in listed]),
        "weights": json.dumps(WEIGHTS),
    }
    save_file(
        {key: one.contiguous() for key, one in found.items()},
        Path(__file__).with_name("mergekit.safetensors"),
        metadata,
    )


if __name__ == "__main__":
    main()
