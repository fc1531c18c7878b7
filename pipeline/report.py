"""What one execution of a recipe found: the JSON of `--report`, the final table, and what MLflow is told."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table


class Score(BaseModel):
    """One metric of one model on one task."""

    model_config = ConfigDict(extra="forbid")

    value: float = Field(description="the metric")
    n: int = Field(description="samples it was measured on")
    low: float = Field(description="lower end of the 95 % interval")
    high: float = Field(description="upper end of the 95 % interval")


class StageRecord(BaseModel):
    """One step of the workflow, as it ran now or as its artifact remembers it."""

    stage: str = Field(description="stage of the step")
    name: str = Field(description="the model, variant or model/task the step is for")
    status: Literal["run", "cached"] = Field(description="run now, or found in the store")
    seconds: float = Field(description="wall time on the worker, when it ran")
    bytes: int = Field(description="bytes of the artifact")
    peak_memory: int = Field(description="largest resident memory of a worker process in the step, in bytes")
    artifact: str = Field(description="folder of the artifact")
    fingerprint: str = Field(description="sha256 of everything the result depends on")


class VariantInfo(BaseModel):
    """One merge of the recipe, with the coefficients it used."""

    method: str = Field(description="merge method")
    params: dict[str, str] = Field(
        description="settings of the variant, flat: method, weight, density, coefficients.kind …"
    )
    weights: dict[str, dict[str, float]] = Field(description="weight used: weights[layer][expert]")
    tau: dict[str, float] = Field({}, description="cross-task factor of each expert (sens only)")
    sigma: dict[str, dict[str, float]] = Field({}, description="coefficients sigma[layer][expert] (sens only)")
    digest: str = Field(description="sha256 over the names and digests of the merged folder's files")


class Report(BaseModel):
    """Everything `run` found; `tau` and `sigma` are those of the first variant with sens coefficients."""

    recipe: str = Field(description="name of the recipe")
    stages: list[StageRecord] = Field(description="every step, in order")
    models: dict[str, str] = Field(description="folder of base, experts and variants by name")
    roles: dict[str, Literal["base", "expert", "variant"]] = Field(description="what each model is")
    digests: dict[str, str] = Field(description="content digest of base and experts by name")
    tasks: dict[str, str] = Field(description="main metric of each task")
    scores: dict[str, dict[str, dict[str, Score]]] = Field(description="scores[model][task][metric]")
    mean_normalised: dict[str, Score] = Field(description="mean over tasks of main metric / own expert's, by model")
    variants: dict[str, VariantInfo] = Field(description="the merges")
    alpha: dict[str, dict[str, float]] = Field({}, description="alpha[expert][layer]")
    distances: dict[str, dict[str, float]] = Field({}, description="distances[i][j]: expert i against j on j's samples")
    tau: dict[str, float] = Field({}, description="tau[expert]")
    sigma: dict[str, dict[str, float]] = Field({}, description="sigma[layer][expert]")


def score_table(report: Report) -> Table:
    """The final table: a row per model, a column per task (main metric, n, 95 % interval), and the normalised mean."""
    table = Table(title=f"{report.recipe}: main metric on each task, with its 95 % interval", show_lines=True)
    table.add_column("model")
    for task, metric in report.tasks.items():
        table.add_column(f"{task}\n{metric}", justify="right")
    table.add_column("mean\nnormalised", justify="right")
    for model in report.models:
        cells = [_cell(report.scores.get(model, {}).get(task, {}).get(metric)) for task, metric in report.tasks.items()]
        table.add_row(model, *cells, _cell(report.mean_normalised.get(model)))
    return table


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.value:.3f}\n{score.low:.3f}–{score.high:.3f}\nn = {score.n}"
