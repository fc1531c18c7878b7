"""Records what FusionBench 0.2.33 makes of small random models, for the tests of our methods to compare with.

It needs an environment of its own: `pip install fusion_bench==0.2.33`, and then `python record_fusion_bench.py` beside
this file writes `fusion_bench.safetensors` anew. Recorded with torch 2.13.
"""

from pathlib import Path

import torch
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from safetensors.torch import save_file
from torch import Tensor

EXPERTS = 3
SHAPES = {"wide.weight": (12, 19), "tall.weight": (20, 12), "wide.bias": (12,), "conv.weight": (4, 3, 2, 2)}
REDUCE = (1.0, 0.9, 0.0)
FLOOR = 1e-3
COMMON = 0.8
"""of Iso-CTS: the share of directions that all experts have in common"""


def main() -> None:
    """Write base, task vectors, Gram matrices, squared gradients and what FusionBench's own functions make of them."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: randn(*shape) for name, shape in SHAPES.items()}
    deltas = [{name: 0.1 * randn(*shape) for name, shape in SHAPES.items()} for _ in range(EXPERTS)]
    experts = {name: [base[name] + delta[name] for delta in deltas] for name in SHAPES}
    inputs = {name: shape[1] for name, shape in SHAPES.items() if len(shape) == 2}
    rows = [{name: randn(60, width) @ randn(width, width) for name, width in inputs.items()} for _ in range(EXPERTS)]
    grams = [{name: one.T @ one / len(one) for name, one in by_name.items()} for by_name in rows]
    fishers = [{name: randn(*shape).square() for name, shape in SHAPES.items()} for _ in range(EXPERTS)]

    found: dict[str, Tensor] = {f"base/{name}": tensor for name, tensor in base.items()}
    for key, several in (("delta", deltas), ("gram", grams), ("fisher", fishers)):
        found |= {f"{key}{k}/{name}": one for k, by_name in enumerate(several) for name, one in by_name.items()}
    by_module = [{name.removesuffix(".weight"): gram for name, gram in by_name.items()} for by_name in grams]
    for factor in REDUCE:
        merged = merging_with_regmean_weights(experts, by_module, reduce_non_diagonal_ratio=factor)
        found |= {f"regmean {factor}/{name}": tensor for name, tensor in merged.items()}
    scaling = torch.ones(EXPERTS) / EXPERTS
    merged = merging_with_fisher_weights(experts, fishers, scaling, False, minimal_fisher_weight=FLOOR)
    found |= {f"fisher/{name}": tensor for name, tensor in merged.items()}
    for key, change in {
        "tsv_m": compute_and_sum_svd_mem_reduction(deltas, accelerator="cpu"),
        "iso_c": iso_c(deltas, accelerator="cpu"),
        "iso_cts": iso_cts(deltas, COMMON, accelerator="cpu"),
    }.items():
        found |= {f"{key}/{name}": base[name] + one for name, one in change.items()}
    save_file(
        {key: one.contiguous() for key, one in found.items()}, Path(__file__).with_name("fusion_bench.safetensors")
    )


if __name__ == "__main__":
    main()
