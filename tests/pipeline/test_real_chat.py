"""SmolLM2-Instruct and three experts of it on rows of messages, from the recipe in `configs/` to scores."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.kinds.chat import ChatSample
from tests.conftest import SHARED, do_steps, plan_of

pytestmark = [pytest.mark.shared, pytest.mark.timeout(1800)]
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "smollm2-chat.yaml"
EXPERTS = ("math", "code", "dialogue")


@pytest.fixture
def recipe() -> dict[str, Any]:
    """The recipe with few rows, a sens merge and a dynamic one, and answers to two problems."""
    build = Path(os.environ.get("SENSMERGE_MODELS", SHARED / "models" / "build"))
    if not (build / "base-lm" / "model.safetensors").is_file():
        pytest.skip(f"needs {build / 'base-lm'}")
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text().replace("../../shared", str(SHARED)))
    found["base"] = str(build / "base-lm")
    for task in found["tasks"].values():
        task["calibration"], task["evaluation"] = (
            task["calibration"] | {"samples": 3},
            task["evaluation"] | {"samples": 2},
        )
        task["max_length"] = 128
    found["tasks"]["math"] |= {"generate": 8, "compare": "number"}
    found["merges"] = {name: found["merges"][name] for name in ("ta-sens", "ta-se")}
    return found


def test_experts_in_the_chat_template(recipe: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe["base"])
    for name in EXPERTS:
        one = plan.inputs.data[name]
        for row in one.evaluation:
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            sample = one.task.sample(row, tokenizer, "")
            assert isinstance(sample, ChatSample)
            assert sample.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)[-128:]
            said = tokenizer.decode([sample.input_ids[place] for place in sample.scored])
            assert f"{row['completion']}<|im_end|>".endswith(said)
    do_steps(plan)
    scores = {
        model: {
            task: read_json(plan.artifact("evaluate", f"{model}/{task}") / "scores.json")
            for task in (EXPERTS if model in ("base", "ta-sens") else (model,))
        }
        for model in ("base", *EXPERTS, "ta-sens")
    }
    scores["ta-se"] = read_json(plan.artifact("evaluate", "ta-se") / "scores.json")
    nll = {model: {task: one["perplexity"]["value"] for task, one in found.items()} for model, found in scores.items()}
    for task in EXPERTS:
        assert nll[task][task] < nll["base"][task]
        assert nll["ta-sens"][task] < nll["base"][task]
        assert nll["ta-se"][task] < nll["base"][task]
    records = read_json(plan.artifact("evaluate", "ta-sens/math") / "records.json")
    assert all(isinstance(record["answer"], str) for record in records)
