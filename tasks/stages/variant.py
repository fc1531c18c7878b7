"""What the two kinds of merge job share: a variant of a recipe, and the parts of its folder that are not merged."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from sensmerge.tasks.artifacts import Artifact, read_json, write_json
from sensmerge.tasks.checkpoints.companions import (
    CONFIG,
    GENERATION_CONFIG,
    companions,
    copy_companions,
    is_tokenizer_file,
    without_code,
)
from sensmerge.tasks.checkpoints.layers import depths, depths_of_blocks, group_by_layer, layer_of
from sensmerge.tasks.checkpoints.quantised import without_quantisation
from sensmerge.tasks.checkpoints.weights import HEAD_WEIGHTS, HEADS, BaseWeights, ExpertWeights
from sensmerge.tasks.coefficients import (
    Coefficients,
    Lines,
    SensCoefficients,
    Weights,
    alpha,
    plain_weights,
    scaled,
    sens_weights,
    sigma,
    tau,
)
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import Added, Local
from sensmerge.tasks.methods.contract import Method, TaskVector, method_of
from sensmerge.tasks.methods.kernels.stored import rounded
from sensmerge.tasks.methods.settings import Values, VariantSettings, VaryingSetting, varied
from sensmerge.tasks.stages.job import Earlier, Job
from sensmerge.tasks.stages.task_vectors import not_finite, read_histogram
from sensmerge.tasks.statistics.statistic import read_layers

TUNE = "tune.json"
"""In an artifact of stage tune: what was tried, what was chosen (`chosen`) and why."""
UNCHANGED = "unchanged"
"""In the results of a merge: experts that change nothing."""
COEFFICIENTS = "coefficients.json"
"""The weights of every layer, see `VariantJob.coefficient_table`."""


@dataclass(frozen=True, kw_only=True)
class VariantJob(Job):
    """All that the merge of one variant reads, and how."""

    stage = "merge"

    models: Mapping[str, str]
    """fingerprints of the artifacts of base and experts"""
    method: Method
    weight: float
    coefficients: Coefficients
    varying: Mapping[str, VaryingSetting] = field(default_factory=dict)
    """settings of the method that change from tensor to tensor; those in `method` are one of their values"""
    lines: Lines | None = None
    statistics: Mapping[str, Artifact] = field(default_factory=dict)
    """by expert: its sensitivity (sens coefficients), and what the method asks for"""
    distances: Artifact | None = None
    """of stage cross_task (sens coefficients only)"""
    shard_size: int
    """bytes"""
    companions: str
    """digest of tokenizer, chat templates and generation config"""
    token_ids: Mapping[str, int | list[int]] = field(default_factory=dict)
    """special tokens for which the merged model's config differs from the base's"""
    classes: Sequence[str] = ()
    """names of the merged head's classes, where the base's config has none"""
    by_name: bool = False
    """whether no class of transformers reads base and experts, and names alone say what tensors are"""
    base_config: Sequence[str] = ()
    """experts with a head of their own that run with the base's config"""
    layout: Added[str | None] = None
    """how tensors are shared out among files, see `tasks.stages.written.laid_out`"""
    tuned: Artifact | None = None
    """of stage tune: what settings have instead of the values here, which are those that it began with"""
    task_vectors: Local[Mapping[str, Artifact]] = field(default_factory=dict)
    """by expert, for a method that reads histograms; without them the merge counts itself"""
    base: Local[BaseWeights]
    experts: Local[Mapping[str, ExpertWeights]]
    head_configs: Local[Mapping[str, str]]
    """by expert that has a head of its own, the config (JSON) of the network that ends in it"""
    tokenizer: Local[Path]
    """folder of the model whose tokenizer, chat template and generation config the merged model gets"""
    groups: Local[Sequence[Sequence[str]]]
    """the base's weights in groups of whole layers; each is merged in one go"""

    @property
    def settings(self) -> VariantSettings:
        """What says how the experts are combined."""
        return VariantSettings(self.method, self.weight, self.coefficients)

    def having(self, settings: VariantSettings) -> Self:
        """Return the job with other settings, which are not to be tuned any more."""
        return replace(
            self, method=settings.method, weight=settings.weight, coefficients=settings.coefficients, tuned=None
        )

    def resumed(self, earlier: Earlier) -> Self:
        """See `Job`: what was tuned has its values from here on."""
        return self if self.tuned is None else self.having(self.settings.having(chosen_values(self.tuned.folder)))

    def parts(self) -> Sequence[int]:
        """Return the numbers of the groups."""
        return range(len(self.groups))

    def weights(self) -> Weights:
        """Return the weight of every expert in every layer.

        Raises:
            InputError: weights in a layer that the method can do nothing with.
        """
        weights: Weights = self.coefficient_table()["weights"]
        for layer, row in weights.items():
            try:
                self.method.check_weights(list(row.values()))
            except ValueError as error:
                raise InputError(f"layer {layer}: {error}") from None
        return weights

    def check_settings(self) -> None:
        """Check the settings of all tensors.

        Raises:
            InputError: no filter of a setting fits a tensor.
        """
        if self.varying:
            for name in self.base.weights:
                try:
                    self.method_for(name)
                except ValueError as error:
                    raise InputError(str(error)) from None

    def coefficient_table(self) -> dict[str, Any]:
        """Return the weights of every layer, and for sens coefficients also the τ and σ that they come from.

        Raises:
            InputError: weights are to grow with depth in a network without blocks.
        """
        assert self.tuned is None, "the job is resumed before it merges"
        layers = self._layers
        table = self._table(layers)
        if self.lines is not None:
            found = depths(list(layers))
            if not found:
                raise InputError(
                    f"lines: {self.base.folder} has no numbered blocks for factors to grow with; leave it out"
                )
            rows = {key: found[key] if key in found else found[layer_of(key)] for key in table["weights"]}
            table["weights"] = scaled(table["weights"], self.lines, rows)
        return table

    @cached_property
    def _layers(self) -> dict[str, list[str]]:
        """The tensors of each layer that are merged."""
        return group_by_layer(name for name in self.base.weights if name not in self.base.statistics)

    @cached_property
    def _depths(self) -> dict[str, float]:
        return depths_of_blocks(list(group_by_layer(self.base.weights)))

    def method_for(self, tensor: str) -> Method:
        """Return the method with the settings that it has for one tensor."""
        if not self.varying:
            return self.method
        return varied(self.method, self.varying, tensor, self._depths[layer_of(tensor)])

    def _table(self, layers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return the table before `lines`."""
        if not isinstance(self.coefficients, SensCoefficients):
            try:
                return {"weights": plain_weights(self.coefficients, self.weight, layers, self._depths, self.experts)}
            except ValueError as error:
                raise InputError(f"coefficients.weights: {error}") from None
        assert self.distances is not None
        alphas = {
            name: _with_tied_layers(alpha(read_layers(one.folder, "sensitivity")), self.base)
            for name, one in self.statistics.items()
        }
        taus = tau(read_json(self.distances.folder / "distances.json"), self.coefficients.direction)
        sigmas = sigma(alphas, taus, self.coefficients.temperature, list(layers))
        return {"weights": sens_weights(sigmas, self.weight), "tau": taus, "sigma": sigmas}

    def task_vector(self, expert: str, tensor: str, weight: float) -> TaskVector:
        """Return the task vector of one tensor of an expert, with all that a method may read beside it."""
        return TaskVector(
            expert,
            tensor,
            self.experts[expert].task_vector(tensor),
            weight,
            partial(self._histogram, expert, tensor),
            partial(self.experts[expert].factors, tensor),
            self.statistics[expert].folder if self.method.statistics else None,
            tuple(self.base.info(tensor).shape),
        )

    def _histogram(self, expert: str, tensor: str) -> Tensor | None:
        counted = self.task_vectors.get(expert)
        return None if counted is None else read_histogram(counted.folder, tensor)

    def contents(self, tensor: str) -> dict[str, str]:
        """Read through a tensor of base and experts, and return digests of what they store, by model.

        Raises:
            InputError: NaN or Inf in one of them.
        """
        found = {"base": self.base.examined(tensor)}
        found |= {name: expert.examined(tensor) for name, expert in self.experts.items()}
        for name, one in found.items():
            if one.bad:
                key, of = ("base", self.base) if name == "base" else (f"experts.{name}", self.experts[name])
                raise not_finite(key, of.folder, tensor, one.bad, one.count)
        return {name: one.content for name, one in found.items()}

    def unchanged(self) -> list[str]:
        """Return the experts that change no tensor of the base."""
        return [name for name, one in self.experts.items() if not any(map(one.changes, self.base.weights))]

    def mean_pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield the experts' mean of a buffer with statistics (`BaseWeights.statistics`), as methods yield a merge.

        Any other weights may leave what no network can use, such as a negative variance.
        """
        share = 1 / len(self.experts)
        vectors = [self.task_vector(expert, name, share) for expert in self.experts]
        return method_of({"method": "task_arithmetic"}).merged_pieces(self.base.read(name), vectors)

    def mean_statistics(self, name: str) -> Tensor:
        """Return the experts' mean of a buffer with statistics, flat, in the base's dtype."""
        dtype = self.base.dtype(name)
        return torch.cat([rounded(piece, dtype)[0].clone() for _, piece in self.mean_pieces(name)])

    def write_companions(self, out: Path, dtype: str | None = None) -> None:
        """Write what makes a folder of weights a Hugging Face model: its config, and all that lies beside the weights.

        Tokenizer, chat templates and generation config are those of the folder `tokenizer`; the rest is the base's.
        What names code is left out, for merged models have none beside them.

        Args:
            out: the folder of the weights.
            dtype: torch name of all weights' dtype; None keeps what the base's config says.
        """
        if (self.base.folder / CONFIG).is_file():
            write_json(out / CONFIG, self._config(dtype))

        def of_tokenizer(name: str) -> bool:
            return is_tokenizer_file(name) or name == GENERATION_CONFIG

        files = {name: path for name, path in companions(self.base.folder).items() if not of_tokenizer(name)}
        files |= {name: path for name, path in companions(self.tokenizer).items() if of_tokenizer(name)}
        copy_companions(files, out)

    def _config(self, dtype: str | None) -> dict[str, Any]:
        """Return the config of the merged model; see `write_companions`."""
        config: dict[str, Any] = without_code(read_json(self.base.folder / CONFIG))
        if self.base.checkpoint.scales:
            config = without_quantisation(config)
        parts = [one for one in (config, config.get("text_config")) if one is not None]
        if self.base.untied:
            for part in parts:
                part["tie_word_embeddings"] = False
        if self.classes:
            config["id2label"] = {str(number): name for number, name in enumerate(self.classes)}
            config["label2id"] = {name: number for number, name in enumerate(self.classes)}
        for key, value in self.token_ids.items():
            for part in [one for one in parts if key in one] or [config]:
                part[key] = value
        if dtype is not None and "model_type" in config:  # a key of transformers
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
        return config

    def write_heads(self, out: Path) -> None:
        """Write the heads that belong to one expert each, and `coefficients.json`, into the merged model's folder.

        Raises:
            InputError: NaN or Inf in a head.
        """
        for name, head_config in self.head_configs.items():
            folder = out / HEADS / name
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {key: tensor.contiguous() for key, tensor in self.experts[name].head_tensors().items()}
            for key, tensor in tensors.items():
                if bad := tensor.numel() - int(tensor.isfinite().sum()):
                    raise not_finite(f"experts.{name}", self.experts[name].folder, key, bad, tensor.numel())
            save_file(tensors, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
            (folder / "config.json").write_text(head_config)
        write_json(out / COEFFICIENTS, self.coefficient_table())


def chosen_values(folder: Path) -> Values:
    """Return the settings that were chosen, from the artifact of stage tune."""
    found: Values = read_json(folder / TUNE)["chosen"]
    return found


def _with_tied_layers(values: Mapping[str, float], base: BaseWeights) -> dict[str, float]:
    """Return values by layer where an expert's embedding that is its head too stands for both layers."""
    tied = {layer_of(name): layer_of(stored) for name, stored in base.stored.items() if stored in base.weights}
    return {**{layer: values[one] for layer, one in tied.items() if one in values}, **values}
