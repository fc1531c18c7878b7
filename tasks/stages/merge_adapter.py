"""Stage merge of adapters into an adapter: of each adapted weight the factors, side by side or of a chosen rank."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sensmerge.tasks.adapters import AdapterSettings
from sensmerge.tasks.artifacts import read_json, write_json
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint
from sensmerge.tasks.checkpoints.companions import GENERATION_CONFIG, companions, copy_companions, is_tokenizer_file
from sensmerge.tasks.checkpoints.header import read_header
from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.coefficients import row_of
from sensmerge.tasks.errors import InputError, noted
from sensmerge.tasks.identity import Local
from sensmerge.tasks.methods.contract import Additive, Factors
from sensmerge.tasks.methods.kernels.low_rank import LowRankMatrix, distance, nearest, norm, side_by_side
from sensmerge.tasks.methods.kernels.matrices import Factored, Matrix
from sensmerge.tasks.methods.remarks import remarks
from sensmerge.tasks.methods.whole import sums_whole
from sensmerge.tasks.networks.adapter import ADAPTER_WEIGHTS
from sensmerge.tasks.networks.adapter_files import PREFIX, AdapterForm, config_of, factor_tensors, write_adapter
from sensmerge.tasks.stages.merge import REMARKS
from sensmerge.tasks.stages.variant import COEFFICIENTS, UNCHANGED, VariantJob
from sensmerge.tasks.stages.written import marker, weights_digest

ERRORS = "errors.json"
"""By tensor: `norm` of what the merge adds, and `error`, the norm of what the adapter lacks of it."""


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight that some experts adapt, in the network that peft loads."""

    module: str
    """its linear layer"""
    transposed: bool
    """whether its shape is (in, out)"""


@dataclass(frozen=True, kw_only=True)
class MergeAdapterJob(VariantJob):
    """Merges one variant of LoRA adapters into a LoRA adapter. Its groups are of what the experts change alone."""

    version = 1

    adapter: AdapterSettings
    out_dtype: str
    """torch name of the factors' dtype"""
    form: Local[AdapterForm]
    adapted: Local[Mapping[str, AdaptedWeight]]
    """by tensor of the base"""
    whole: Local[Mapping[str, str]]
    """by tensor of the base, its name in the network, of those that some experts store whole"""
    tied: Local[Mapping[str, str]]
    """other names of tied parameters, which peft stores too where they are stored whole"""

    def check_settings(self) -> None:
        """See `VariantJob`.

        Raises:
            InputError: as there.
        """
        super().check_settings()
        self.check_rank()

    def check_rank(self) -> None:
        """Check that a rank is given wherever the merge is no sum of the experts' factors.

        Raises:
            InputError: it is not.
        """
        for name in self.adapted if self.adapter.rank is None else ():
            if not sums_whole(self.method_for(name), self.experts):
                raise InputError(
                    f"adapter.rank is missing: method {self.method.name} as it is set does not sum the experts' whole "
                    "task vectors, so their factors cannot be laid side by side; give a rank"
                )

    def run(self, part: int | str, out: Path) -> bool:
        """Merge one group of weights into factors, and write them to a file of their own.

        Memory: that of the method for one tensor, and several times its size in float64 where it is no sum of factors.

        Raises:
            InputError: NaN or Inf in base or experts, or in the factors.
        """
        assert isinstance(part, int)
        if (out / marker(part)).exists():
            return False
        torch.set_num_threads(1)  # sums and products must not depend on how many threads share them
        weights = self.weights()
        tensors: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        for name in self.groups[part]:
            with noted(f"tensor {name}"), remarks() as said:
                made, found[name] = self._made(name, row_of(weights, name, layer_of(name)))
            tensors |= made
            found[name][REMARKS] = said
        save_file(tensors, out / _file(part))
        write_json(out / marker(part), found)
        return True

    def finish(self, out: Path) -> dict[str, Any]:
        """Put the groups together, and write what peft loads, with tokenizer, `coefficients.json` and `errors.json`.

        Memory: the adapter.

        Returns:
            `digest`, `tensors`, `tensor_bytes`, `remarks` and `unchanged` as of other merges; `adapter`: `rank` of its
            largest factors, `error` and `worst_error`, relative to what the merge adds to all weights and to `worst`.
        """
        tensors: dict[str, Tensor] = {}
        found: dict[str, dict[str, Any]] = {}
        for part in self.parts():
            tensors |= load_file(out / _file(part))
            found |= read_json(out / marker(part))
        config = config_of({one.module: found[name]["rank"] for name, one in self.adapted.items()}, self.form)
        write_adapter(out, tensors, config)
        files = {name: path for name, path in companions(self.tokenizer).items() if _travels(name)}
        copy_companions(files, out)
        write_json(out / COEFFICIENTS, self.coefficient_table())
        errors = {name: {key: one[key] for key in ("rank", "norm", "error")} for name, one in found.items()}
        write_json(out / ERRORS, errors)
        for part in self.parts():
            (out / marker(part)).unlink()
            (out / _file(part)).unlink()
        said: dict[str, list[str]] = {}
        for name, one in found.items():
            for text in one[REMARKS]:
                said.setdefault(text, []).append(name)
        return {
            "digest": weights_digest(Checkpoint(out, read_header(out / ADAPTER_WEIGHTS))),
            "tensors": len(tensors),
            "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
            REMARKS: said,
            UNCHANGED: self.unchanged(),
            "adapter": summary(found),
        }

    def _made(self, name: str, weights: Mapping[str, float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the adapter stores for a tensor by peft's names, and its rank, norm and error."""
        if name in self.whole:
            base, values = self.base.read(name), self._merged(name, weights)
            stored = values.to(base.dtype)
            self._check_finite(name, stored)
            names = (self.whole[name], *(one for one, other in self.tied.items() if other == self.whole[name]))
            added = float(torch.linalg.vector_norm((stored.float() - base.float()).double()))
            return {f"{PREFIX}{one}": stored.clone() for one in names}, {"rank": 0, "norm": added, "error": 0.0}
        matrix, factors = self._factors(name, weights)
        one = self.adapted[name]
        tensors = factor_tensors(one.module, factors.transposed() if one.transposed else factors)
        return tensors, {"rank": factors.rank, "norm": norm(matrix), "error": distance(matrix, factors)}

    def _factors(self, name: str, weights: Mapping[str, float]) -> tuple[Matrix, LowRankMatrix]:
        """Return what the merge adds to a weight, and its factors in the dtype that they are stored in."""
        method, rank = self.method_for(name), self.adapter.rank
        matrix: Matrix
        if sums_whole(method, self.experts):
            assert isinstance(method, Additive)
            parts = list(self._parts(name, method.shares([weights[expert] for expert in self.experts])))
            matrix = Factored(
                torch.cat([second.double() * factor for _, second, factor in parts], 1),
                torch.cat([first.double() for first, _, _ in parts]),
            )
            factors = side_by_side(parts) if rank is None else nearest(matrix, rank).filled(rank)
        else:
            assert rank is not None, "check has refused it"
            matrix = (self._merged(name, weights) - self.base.read(name).float()).double()
            self._check_finite(name, matrix)
            factors = nearest(matrix, rank).filled(rank)
        dtype = getattr(torch, self.out_dtype)
        factors = LowRankMatrix(factors.first.to(dtype), factors.second.to(dtype))
        self._check_finite(name, factors.first, factors.second)
        return matrix, factors

    def _merged(self, name: str, weights: Mapping[str, float]) -> Tensor:
        """Return a merged tensor, float32."""
        base = self.base.read(name)
        vectors = [self.task_vector(expert, name, weights[expert]) for expert in self.experts]
        values = torch.empty(base.numel())
        for where, piece in self.method_for(name).merged_pieces(base, vectors):
            values[where] = piece
        return values.view(base.shape)

    def _parts(self, name: str, shares: Sequence[float]) -> Iterator[Factors]:
        """Yield the factors of the experts that adapt a weight, and what each product is multiplied by."""
        for expert, share in zip(self.experts.values(), shares, strict=True):
            factors = expert.factors(name)
            if factors is not None:
                yield factors[0], factors[1], factors[2] * share

    def _check_finite(self, name: str, *tensors: Tensor) -> None:
        if all(bool(one.isfinite().all()) for one in tensors):
            return
        self.contents(name)  # says which model has NaN or Inf, if one has
        raise InputError(
            f"tensor {name} merged by {self.method.name} has NaN or Inf as {self.out_dtype}; set another out_dtype, or "
            "other weights"
        )


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return in few numbers what an adapter lacks: in all, and where it lacks most; relative norms.

    Args:
        found: by tensor `rank`, `norm` and `error`.
    """
    relative = {name: one["error"] / one["norm"] if one["norm"] else 0.0 for name, one in found.items()}
    whole = math.hypot(*(one["norm"] for one in found.values()))
    worst = max(relative, key=lambda name: relative[name])
    return {
        "rank": max(one["rank"] for one in found.values()),
        "error": math.hypot(*(one["error"] for one in found.values())) / whole if whole else 0.0,
        "worst": worst,
        "worst_error": relative[worst],
    }


def _file(part: int | str) -> str:
    return f".group-{part}.safetensors"


def _travels(name: str) -> bool:
    return is_tokenizer_file(name) or name == GENERATION_CONFIG
