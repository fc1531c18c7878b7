"""The model card of a merged folder."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report.report import (
    Report,
    RouteInfo,
    TuningInfo,
    VariantInfo,
    shown,
    sweep_lines,
    tuning_lines,
)
from sensmerge.tasks.artifacts import write_whole
from sensmerge.tasks.checkpoints.listing import HubModel, LocalModel, UrlModel

CARD = "README.md"
"""The file, in the folder of the merge."""

SCORES = {
    "nearest": "how near the merged model's representation of it is to each expert's",
    "shift": "how far each expert moves its representation from the base's, against the expert's calibration samples",
    "alignment": "whether each expert moves its representation where the merge does, against the expert's calibration "
    "samples",
    "centroid": "how near the base's representation of it is to the mean of each expert's calibration samples",
    "discriminant": "how near the base's representation of it is to the mean of each expert's calibration samples, in "
    "the space of the linear discriminants of these samples",
}
POOLS = {"cls": "first token", "mean": "mean over tokens", "last": "last token"}
METRICS = {"l2": "Euclidean distance", "cosine": "cosine"}


def write_cards(plan: Plan, report: Report, recipe_text: str) -> None:
    """Write README.md into every merged folder: what was merged and how, the recipe, and the scores of all models."""
    for name in plan.recipe.merges:
        folder = Path(report.models[name])
        write_whole(folder / CARD, card_text(plan, report, name, recipe_text))
        plan.store.upload(folder, CARD)


def _library(plan: Plan, variant: VariantInfo, is_routed: bool) -> str | None:
    """Return what loads a merged model, as the hub calls it; None where nothing is known to."""
    if is_routed:
        return "sensmerge"
    if variant.adapter is not None:
        return "peft"
    return None if plan.inputs.by_name else "transformers"


def card_text(plan: Plan, report: Report, name: str, recipe_text: str) -> str:
    """Return the model card of one variant, with the metadata that the hub reads."""
    variant, route = report.variants[name], report.routes.get(name)
    data = ModelCardData(
        base_model=[_model_id(plan, model) for model in ("base", *plan.recipe.experts)],
        library_name=_library(plan, variant, route is not None),
        tags=["merge", "sensmerge", variant.method, *([] if route is None else ["se-merging"])],
    )
    heads = [expert for expert in plan.recipe.experts if (Path(report.models[name]) / "heads" / expert).is_dir()]
    settings = "\n".join(f"- {key}: {value}" for key, value in variant.params.items())
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {report.recipe}: {name}\n",
        f"A merge of {', '.join(plan.recipe.experts)} on their common base, made by sensmerge without training.\n",
        f"## Merge\n\n{settings}\n",
        _tuning_text(variant.tuning) if variant.tuning is not None else "",
        "".join(f"{note}\n" for note in _notes(report, name)),
        _route_text(route, variant.params) if route is not None else "",
        f"## Scores\n\n{_score_lines(report)}\n" if report.tasks else "",
        _adapter_text(_model_id(plan, "base")) if variant.adapter is not None else "",
        _heads_text(heads, plan.inputs.heads[heads[0]].network) if heads and route is None else "",
        f"## Recipe\n\n```yaml\n{recipe_text}```\n",
    ]
    return "\n".join(part for part in parts if part)


def _adapter_text(base: str) -> str:
    """How to load an adapter."""
    return f"""## Use

The folder is a LoRA adapter of {base}. With `base` as transformers loads it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "FOLDER")
```
"""


def _tuning_text(tuning: TuningInfo) -> str:
    """What was tried, on which rows, and what was chosen."""
    header = [*tuning.chosen, "mean normalised"]
    rows = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for one in tuning.tried:
        rows.append("| " + " | ".join([*map(shown, one.values.values()), str(one.mean)]) + " |")
    (first, *notes) = tuning_lines("Chosen", tuning)
    lines = "\n".join([first, *notes])
    return f"## Tuning\n\n{lines}\n\n" + "\n".join(rows) + "\n"


def _notes(report: Report, name: str) -> list[str]:
    """Return what is to be said of the experts' base, of tensors, and of the sweep that a variant is one of."""
    prefix = f"merges.{name}: "
    of_tensors = [note.removeprefix(prefix) for note in report.notes if note.startswith(prefix)]
    sweeps = [line for sweep, one in report.sweeps.items() if name in one.members for line in sweep_lines(sweep, one)]
    return [*report.other_bases.values(), *of_tensors, *sweeps]


def _model_id(plan: Plan, name: str) -> str:
    source, inner = plan.inputs.listings[name].source, plan.recipe.models()[name].subfolder
    depth = len(Path(inner).parts) + 1
    match source:
        case HubModel():
            return source.repo
        case UrlModel():
            return "/".join(source.url.split("/")[-depth:])
        case LocalModel():
            return "/".join(source.folder.parts[-depth:])


def _score_lines(report: Report) -> str:
    header = ["model", *(f"{task} ({metric})" for task, metric in report.tasks.items()), "mean normalised"]
    rows = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for model in report.models:
        scores = [report.scores.get(model, {}).get(task, {}).get(metric) for task, metric in report.tasks.items()]
        cells = [str(score) if score else "–" for score in (*scores, report.mean_normalised.get(model))]
        rows.append("| " + " | ".join([model, *cells]) + " |")
    return "\n".join(rows)


def own_scores(report: Report, model: str) -> str:
    """Return what one model scores on each task beside the task's own expert, as a list in Markdown."""
    lines = [f"- {task}, {metric}: {_beside(report, model, task, metric)}" for task, metric in report.tasks.items()]
    if model in report.mean_normalised:
        lines.append(f"- mean of score ÷ own expert's: {report.mean_normalised[model]}")
    return "\n".join(lines)


def _beside(report: Report, model: str, task: str, metric: str) -> str:
    mine, own = (report.scores.get(name, {}).get(task, {}).get(metric) for name in (model, task))
    if mine is None:
        return "not scored"
    return str(mine) + ("" if own is None else f"; its own expert {own.value:.3f}")


def _route_text(route: RouteInfo, params: Mapping[str, str]) -> str:
    """How to load a dynamic model, what it routes by, how often that is right, and what becomes of it if it is not."""
    rule = route.rule
    metric = "" if rule["score"] in ("alignment", "discriminant") else f", {METRICS[str(rule['metric'])]}"
    right = [f"- held-out calibration samples: {route.calibration}"]
    if route.evaluation is not None:
        right.append(f"- evaluation samples: {route.evaluation}")
    if route.right_coefficient is not None:
        right.append(f"- mean coefficient of the right expert, evaluation samples: {route.right_coefficient}")
    shares, fallback = "\n".join(right), float(params["application.fallback"])
    if route.trust == 1:
        followed = "Here the route is followed fully."
    else:
        followed = (
            f"Here they are: {route.trust:.0%} of each coefficient is the route's, {1 - route.trust:.0%} the static "
            "merge's."
        )
    return f"""## Use

The folder is a dynamic model (SE-Merging): the base, and beside it what each expert adds to it. Every input gets
coefficients of its own. transformers cannot load it (the base alone is in `base/`); with sensmerge installed:

```python
from pathlib import Path

from sensmerge import DynamicModel

model = DynamicModel.load(Path("FOLDER"))
for answer in model.predict(["a text", "another"]):
    print(answer.prediction, answer.expert, answer.coefficients)
```

## Route

An input goes to the experts that it resembles: {SCORES[str(rule["score"])]}
(`{rule["score"]}`, output of block {rule["layer"]}, {POOLS[str(rule["pool"])]}{metric}).
The right expert was found, as a share of samples [95 % interval]:

{shares}

Where a route finds the right expert of less than {fallback:.0%} of the held-out calibration samples
(`application.fallback`; the lower end of the interval counts), its coefficients are drawn towards those of the static
merge. {followed}
"""


def _heads_text(heads: list[str], network: str) -> str:
    """How to load the experts' heads; the first one's network is of the class `network`."""
    from sensmerge.tasks.networks.networks import own_ending  # transformers takes seconds
    from sensmerge.tasks.networks.zero_shot import CLIPZeroShotClassifier

    loader = "TokenClassification" if own_ending([network]) == "token_classification" else "SequenceClassification"
    if network.endswith("ForImageClassification"):
        loader = "ImageClassification"
    about = f"""## Heads

The merged trunk is this folder's `model.safetensors`; `heads/` keeps the classifier of each task
({", ".join(heads)}). A classifier for one of them:
"""
    if network == CLIPZeroShotClassifier.__name__:
        return f"""{about}
```python
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import CLIPVisionModel

head = load_file("FOLDER/heads/{heads[0]}/head.safetensors")
model = CLIPVisionModel.from_pretrained("FOLDER")


def logits(pixel_values):
    pooled = model(pixel_values=pixel_values).pooler_output
    return normalize(pooled @ head["visual_projection.weight"].T, dim=-1) @ head["classifier.weight"].T
```
"""
    return f"""{about}
```python
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelFor{loader}

task = "{heads[0]}"
config = AutoConfig.from_pretrained(f"FOLDER/heads/{{task}}")
# This warns that the head is newly initialised; the next line loads it.
model = AutoModelFor{loader}.from_pretrained("FOLDER", config=config)
model.load_state_dict(load_file(f"FOLDER/heads/{{task}}/head.safetensors"), strict=False)
```
"""
