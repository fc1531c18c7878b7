"""The model card of a merged folder."""

import os
from pathlib import Path

from huggingface_hub import ModelCardData

from pipeline.plan import Plan
from pipeline.report import Report
from tasks.download import HubModel


def write_cards(plan: Plan, report: Report, recipe_text: str) -> None:
    """Write README.md into every merged folder: what was merged and how, the recipe, and the scores of all models."""
    for name in plan.recipe.merges:
        folder = Path(report.models[name])
        partial = folder / f".README.md.{os.getpid()}"
        partial.write_text(card_text(plan, report, name, recipe_text))
        partial.replace(folder / "README.md")


def card_text(plan: Plan, report: Report, name: str, recipe_text: str) -> str:
    """Return the model card of one variant, with the metadata that the hub reads."""
    variant = report.variants[name]
    data = ModelCardData(
        base_model=[_model_id(plan, model) for model in ("base", *plan.recipe.experts)],
        library_name="transformers",
        tags=["merge", "sensmerge", variant.method],
    )
    heads = [expert for expert in plan.recipe.experts if (Path(report.models[name]) / "heads" / expert).is_dir()]
    settings = "\n".join(f"- {key}: {value}" for key, value in variant.params.items())
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {report.recipe}: {name}\n",
        f"A merge of {', '.join(plan.recipe.experts)} on their common base, made by sensmerge without training.\n",
        f"## Merge\n\n{settings}\n",
        f"## Scores\n\n{_score_lines(report)}\n" if report.tasks else "",
        _heads_text(heads) if heads else "",
        f"## Recipe\n\n```yaml\n{recipe_text}```\n",
    ]
    return "\n".join(part for part in parts if part)


def _model_id(plan: Plan, name: str) -> str:
    source = plan.inputs.listings[name].source
    return source.repo if isinstance(source, HubModel) else source.folder.name


def _score_lines(report: Report) -> str:
    header = ["model", *(f"{task} ({metric})" for task, metric in report.tasks.items()), "mean normalised"]
    rows = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for model in report.models:
        scores = [report.scores.get(model, {}).get(task, {}).get(metric) for task, metric in report.tasks.items()]
        cells = [
            f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}], n = {score.n}" if score else "–"
            for score in (*scores, report.mean_normalised.get(model))
        ]
        rows.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(rows)


def _heads_text(heads: list[str]) -> str:
    return f"""## Heads

The merged trunk is this folder's `model.safetensors`; `heads/` keeps the classifier of each task
({", ".join(heads)}). A classifier for one of them:

```python
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

task = "{heads[0]}"
config = AutoConfig.from_pretrained(f"FOLDER/heads/{{task}}")
model = AutoModelForSequenceClassification.from_pretrained("FOLDER", config=config)
model.load_state_dict(load_file(f"FOLDER/heads/{{task}}/head.safetensors"), strict=False)
```
"""
