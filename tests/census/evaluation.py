"""Scores of the census, against plain transformers."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.errors import InputError
from tests.census.cases import EXPERTS, Case, do
from tests.census.sens import inputs_of, labels_of, with_head

TOLERANCE = 1e-4
"""Of sums of float32 logarithms, relative."""
MERGE = {"method": "task_arithmetic", "weight": 0.4}


def scores(case: Case) -> str:
    """Records of base, experts and merged model on the tasks of both experts."""
    try:
        plan = case.plan({**case.recipe("full", MERGE), "tasks": case.tasks("evaluation")}, "evaluation")
    except InputError as error:
        return f"refused: {error}"
    try:
        for (model, folder), name in product(do(plan).models().items(), EXPERTS):
            records = read_json(plan.artifact("evaluate", f"{model}/{name}") / "records.json")
            network = case.network(folder)
            if case.classifies and model != name:
                network = with_head(network, case.network(case.experts("full")[name]))
            for number, (found, row) in enumerate(zip(records, case.rows[name], strict=True)):
                expected = _record(case, network, row)
                if any(abs(found[key] - value) > TOLERANCE * abs(value) for key, value in expected.items()):
                    return f"wrong: row {number} of {name} has {found} by {model}, not {expected}"
        return "right"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _record(case: Case, network: PreTrainedModel, row: Mapping[str, object]) -> dict[str, Any]:
    """Return what the record of a row has to hold."""
    inputs, more = inputs_of(case, row), {} if case.classifies else {"use_cache": False}
    if case.writes:
        more["labels"] = labels_of(case, row, inputs)
    with torch.inference_mode():
        logits = network(**inputs, **more).logits[0].float()
    labels = labels_of(case, row, inputs)[0]
    if case.classifies:
        return {"prediction": int(logits.argmax()), "label": int(labels)}
    if not case.writes:  # the next token
        logits, labels = logits[:-1], labels[1:]
    nll = cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    counted = labels != -100
    correct = (logits.argmax(-1) == labels)[counted]
    return {"nll": float(nll), "tokens": int(counted.sum()), "correct": int(correct.sum())}
