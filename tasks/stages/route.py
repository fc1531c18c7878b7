"""Stage route: how a dynamic model tells which experts a sample resembles, judged on the calibration sets."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sensmerge.tasks.artifacts import Artifact, link_file, read_json, sha256_file, write_json
from sensmerge.tasks.dynamic.application import OriginName, SeApplication
from sensmerge.tasks.dynamic.folder import FORMAT, STATISTICS, Manifest, load_network_with_heads, write_manifest
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.probes import Place, probe_all, probes
from sensmerge.tasks.dynamic.router import (
    Features,
    RouterSettings,
    Rule,
    candidates,
    choose,
    fit,
    identified,
    judge,
    trust,
)
from sensmerge.tasks.dynamic.vectors import BASE
from sensmerge.tasks.dynamic.writing import FILES
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.identity import For, Local
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.kinds.questions import kept_settings
from sensmerge.tasks.kinds.scores import mean_score
from sensmerge.tasks.networks.readers import load_reader, read_by
from sensmerge.tasks.networks.tokens import Inputs, batches, collate, length, pad_token
from sensmerge.tasks.stages.job import Job

BATCH_SIZE = 8
"""Samples of full length per forward pass that are probed up to K + 2 times in it; as many more where each probe has a
pass of its own."""


@dataclass(frozen=True)
class RouteJob(Job):
    """Chooses the rule of a dynamic model, estimates its statistics, and completes the model with them."""

    stage = "route"
    version = 6

    model: Artifact
    """of stage merge or vectors: what task vectors start from, and these"""
    calibration: Annotated[Mapping[str, RowSet], For("calibration")]
    """the calibration set of every expert, in the order of coefficients"""
    application: SeApplication
    """the recipe's settings"""
    static: float
    """every expert's coefficient in the static merge; 0 if that is the origin"""
    dtype: str
    """torch name of the network's dtype"""
    device: Local[str]
    """torch device"""
    origin: OriginName = "base"
    """weights that task vectors start from"""

    def finish(self, out: Path) -> dict[str, Any]:
        """Make the dynamic model.

        Args:
            out: its folder: the files of `model`, hard-linked where the file system can, `dynamic.json`, the
                statistics, and `route.json`: every rule looked at with its held-out accuracy and price, which expert
                was taken for which, and the calibration samples in two dimensions.

        Returns:
            `digest` over the digests of all files; `rule`; `identification`: held-out accuracy with n and interval;
            `trust`; `bytes`: size of all weights, heads and statistics included.

        Raises:
            InputError: hidden states that are not finite.
        """
        model, calibration = self.model.folder, self.calibration
        names = list(calibration)
        head = next(iter(calibration.values())).task.head
        network, _ = load_network_with_heads(model, names, head, self.dtype, self.device)
        rules = candidates(self.application, network.blocks, self.origin)
        features, owners = _features(model, network, calibration, rules, self.static)
        judged = judge(rules, features, owners, len(names), network.blocks)
        chosen = choose(judged, len(owners))
        rule = chosen.rule
        own = features[rule.layer, rule.pool]
        statistics = fit(rule, own, owners, len(names))
        found = identified(rule, own, owners, len(names))
        identification = mean_score((found == owners).double().tolist(), is_proportion=True)
        followed = trust(identification.low, len(names), self.application.fallback)
        for name in (*read_json(model / FILES), FILES):
            link_file(model / name, out / name)
        save_file(statistics.tensors(), out / STATISTICS)
        report = {
            "identification": asdict(identification),
            "confusion": _confusion(names, owners, found),
            "candidates": [asdict(each.rule) | {"accuracy": each.accuracy, "passes": each.passes} for each in judged],
            "projection": _projection(names, owners, own),
        }
        write_json(out / "route.json", report)
        digests: dict[str, str] = read_json(model / FILES)
        digests |= {name: sha256_file(out / name) for name in (STATISTICS, "route.json")}
        manifest = Manifest(
            version=FORMAT,
            experts=names,
            head=head,
            dtype=self.dtype,
            rule=rule,
            router=self._settings(followed),
            tasks=kept_settings({name: one.task for name, one in calibration.items()}),
            files=digests,
        )
        return {
            "digest": write_manifest(out, manifest),
            "rule": asdict(rule),
            "identification": asdict(identification),
            "trust": followed,
            "passes": chosen.passes,
            "bytes": sum(path.stat().st_size for path in out.rglob("*.safetensors")),
        }

    def _settings(self, followed: float) -> RouterSettings:
        """Return how affinities become coefficients; `followed` is from `trust`."""
        default = 1.0 if self.origin == "static" else self.static * len(self.calibration)
        return RouterSettings(
            temperature=self.application.temperature,
            mass=default if self.application.mass is None else self.application.mass,
            static=self.static,
            trust=followed,
            origin=self.origin,
        )


def _features(
    model: Path,
    network: DynamicNetwork,
    calibration: Mapping[str, RowSet],
    rules: list[Rule],
    static: float,
) -> tuple[dict[Place, Features], Tensor]:
    """Return the features of all calibration samples by layer and pool, on the CPU, and whose each sample is (N,)."""
    tokenizer = load_reader(model / BASE, read_by(network.network))
    prompts: list[Inputs] = []
    owners: list[int] = []
    for number, (name, one) in enumerate(calibration.items()):
        for i, row in enumerate(one.rows.read()):
            where = f"row {i} of tasks.{name}.calibration"
            sample = one.task.sample(row, tokenizer, where, one.label2id)
            assert sample.has_prompt, f"{where}: the plan refuses empty prompts"
            prompts.append(sample.prompt)
            owners.append(number)
    pad_id, lengths = pad_token(network.network, tokenizer), [length(prompt) for prompt in prompts]
    size = BATCH_SIZE * (len(probes(rules, len(calibration), static)) if network.writes_out(sum(lengths)) else 1)
    places = batches(lengths, size)
    inputs = [collate([prompts[place] for place in some], pad_id) for some in places]
    with torch.inference_mode():
        found = probe_all(network, inputs, rules, len(calibration), static)
    # In order of length, so that the halves that rules are judged on are alike.
    order = torch.tensor(sorted(range(len(prompts)), key=lengths.__getitem__))
    at = torch.tensor([place for some in places for place in some]).argsort()[order]
    features = {key: found.pop(key).rows(at) for key in list(found)}  # each is let go of as it is copied
    for (layer, _), states in features.items():
        if not all(bool(each.isfinite().all()) for each in vars(states).values() if each is not None):
            raise InputError(
                f"hidden states of the calibration samples are NaN or infinite at layer {layer}; "
                "merge with a smaller weight or a wider dtype"
            )
    return features, torch.tensor(owners)[order]


def _confusion(names: list[str], owners: Tensor, found: Tensor) -> dict[str, dict[str, int]]:
    """Count, for each task, the experts that its samples were taken for."""
    return {
        task: {expert: int(((owners == i) & (found == j)).sum()) for j, expert in enumerate(names)}
        for i, task in enumerate(names)
    }


def _projection(names: list[str], owners: Tensor, features: Features) -> dict[str, list[list[float]]]:
    """Return the samples of each task in the first two principal components of the features that the rule looks at."""
    states = features.base if features.base is not None else features.merged
    assert states is not None
    centred = (states - states.mean(0)).double()
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    # The sign of an axis is arbitrary: the largest entry decides.
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    points = centred @ axes.T
    return {name: points[owners == i].tolist() for i, name in enumerate(names)}
