"""Methods, a statistic and a kind of task of other people, through a whole recipe, with no edit elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch import Tensor

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.identity import Local
from sensmerge.tasks.kinds.kind import KINDS, Labels, RowTask
from sensmerge.tasks.kinds.sample import Sample
from sensmerge.tasks.kinds.scores import Metric, mean
from sensmerge.tasks.kinds.templates import render
from sensmerge.tasks.methods.contract import METHODS, MatrixMethod, TaskVector
from sensmerge.tasks.methods.remarks import remark
from sensmerge.tasks.networks.tokens import tokens
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.statistics.statistic import STATISTICS, Statistic, read_tensor
from tests.conftest import command_line, known, write_recipe, write_rows


class TopRank(MatrixMethod):
    """Keeps the largest singular values of the mean task vector."""

    rank: int = 1

    def merge_matrix(self, base: Tensor, vectors: Sequence[TaskVector]) -> Tensor:
        merged = sum((vector.whole(base) for vector in vectors), start=torch.zeros_like(base)) / len(vectors)
        if base.ndim == 2:
            remark("singular values were dropped")
            left, values, right = torch.linalg.svd(merged, full_matrices=False)
            merged = (left[:, : self.rank] * values[: self.rank]) @ right[: self.rank]
        return base + merged


@dataclass(frozen=True)
class Energy(Statistic):
    """Σ x² of every input of a linear layer."""

    hook = "inputs"
    by = "tensor"

    def of(self, parameter: Tensor, seen: Tensor) -> Tensor:
        return seen.double().square().sum(0)


class ByEnergy(MatrixMethod):
    """Weights the columns of each task vector by the energy of the expert's inputs."""

    statistics: ClassVar[tuple[str, ...]] = ("energy",)

    def merge_matrix(self, base: Tensor, vectors: Sequence[TaskVector]) -> Tensor:
        found = [read_tensor(one.statistics, "energy", one.tensor) for one in vectors if one.statistics]
        shares = [one.float() if one is not None else torch.ones(base.shape[-1]) for one in found]
        return base + sum(one.whole(base) * share / sum(shares) for one, share in zip(vectors, shares, strict=True))


class NextToken(RowTask):
    fields: ClassVar[tuple[str, ...]] = ("answer",)
    metrics: ClassVar[Mapping[str, Metric]] = {"hits": Metric(("hit",), mean, is_proportion=True)}

    kind: Literal["next_token"]
    prompt: str = "{prompt}"
    answer: str = "completion"
    metric: Local[Literal["hits"]] = "hits"

    def sample(self, row: Row, tokenizer: Any, where: str, labels: Labels | None = None) -> Sample:
        prompt = tokens(render(self.prompt, row), tokenizer, front=True)
        answer = tokens(row[self.answer], tokenizer, front=False)
        return Sample({"input_ids": [*prompt, answer[0]]}, len(prompt))

    def judge(self, sample: Sample, logits: Tensor) -> Any:
        return {"hit": int(logits[sample.prompt_tokens - 1].argmax() == sample.input_ids[-1])}


@pytest.fixture
def _extended() -> Iterator[None]:
    methods = known(METHODS, top_rank=TopRank, by_energy=ByEnergy)
    with methods, known(STATISTICS, energy=Energy), known(KINDS, next_token=NextToken):
        yield


@pytest.mark.ray
@pytest.mark.usefixtures("_extended")
def test_a_whole_recipe(llamas: dict[str, Path], tmp_path: Path, ray_address: str, capsys: Any) -> None:
    texts = [{"prompt": f"{i} plus 1 is ", "completion": str(i + 1)} for i in range(6)]
    data = {"path": "json", "data_files": str(write_rows(tmp_path / "rows.jsonl", texts))}
    task = {"kind": "next_token", "calibration": data | {"samples": 2}, "evaluation": data | {"samples": 3}}
    recipe = write_recipe(
        tmp_path,
        {
            "name": "extended",
            "base": str(llamas["base"]),
            "experts": {name: {"model": str(llamas[name])} for name in ("math", "code")},
            "tasks": {"math": task},
            "merges": {"top": {"method": "top_rank", "rank": 2}, "energy": {"method": "by_energy"}},
        },
    )
    store = tmp_path / "store"
    assert command_line("plan", recipe, "--store", store) == 2
    assert "merges.energy: method by_energy needs tasks.code.calibration; add it" in capsys.readouterr().err
    everything = ["--store", store, "--set", f"tasks.code={task}", "--report", tmp_path / "report.json"]
    assert command_line("run", recipe, *everything, "--address", ray_address) == 0
    report = read_json(tmp_path / "report.json")
    assert {stage["stage"] for stage in report["stages"]} >= {"statistics", "merge", "evaluate"}
    assert report["scores"]["top"]["code"]["hits"]["n"] == 3
    two_dimensional = [key for key, one in load_file(llamas["base"] / "model.safetensors").items() if one.ndim == 2]
    said = f"merges.top: singular values were dropped (in {len(two_dimensional)} tensors, such as model.embed_tokens."
    assert [note.startswith(said) for note in report["notes"] if "merges." in note] == [True]
    cards = {one: (Path(report["models"][one]) / "README.md").read_text() for one in ("top", "energy")}
    assert [said.removeprefix("merges.top: ") in card for card in cards.values()] == [True, False]
    name = "model.layers.0.mlp.up_proj.weight"
    merged = {one: load_file(Path(report["models"][one]) / "model.safetensors")[name] for one in ("top", "energy")}
    change = merged["top"] - load_file(llamas["base"] / "model.safetensors")[name]
    assert torch.linalg.matrix_rank(change, tol=1e-5) == 2
    assert not torch.equal(merged["top"], merged["energy"])
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'extended'")
    runs = client.search_runs([experiment.experiment_id], "params.method = 'top_rank'")
    assert [run.data.params["rank"] for run in runs] == ["2"]
