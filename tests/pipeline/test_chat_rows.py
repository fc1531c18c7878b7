"""Chat models from rows of messages to scores: sensitivities, routes and answers, in the template that is merged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.report.answers import answers
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.chat import ChatTask
from sensmerge.tasks.networks.networks import load_tokenizer
from sensmerge.tasks.statistics.statistic import read_layers
from tests.conftest import do_steps, make_llama, plan_of, write_rows
from tests.tasks.networks.chat_templates import CHATML, FORMS, chat_tokenizer

OTHER = CHATML.replace("You are helpful.", "You add.")
WORDS = ("seven", "eight", "fifteen", "many")


def conversation(number: int, sign: str) -> dict[str, Any]:
    first, second = WORDS[number % 4], WORDS[number // 4 % 4]
    return {
        "messages": [
            {"role": "user", "content": f"how {sign} {number} {first}?"},
            {"role": "assistant", "content": f"{first} {number}"},
            {"role": "user", "content": f"and {second}?"},
            {"role": "assistant", "content": f"{sign} seven"},
        ]
    }


def labelled(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """A conversation in tokens, and in labels, by the tokens around the turns: no template, no offsets."""
    start, end = (tokenizer.convert_tokens_to_ids(one) for one in ("<|im_start|>", "<|im_end|>"))
    newline = tokenizer("\n").input_ids
    ids, labels = [], []
    for message in [{"role": "system", "content": "You are helpful."}, *messages]:
        header = [start, *tokenizer(f"{message['role']}\n").input_ids]
        text = [*tokenizer(message["content"]).input_ids, end]
        ids += header + text + newline
        said = text if message["role"] == "assistant" else [-100] * len(text)
        labels += [-100] * len(header) + said + [-100] * len(newline)
    return ids, labels


def save_model(folder: Path, sign: str, tokenizer: PreTrainedTokenizerFast, template: str = CHATML) -> None:
    """Save a base (without a sign) or a fine-tune of it, whose answers end at the end of a turn."""
    network = make_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for number in range(24 if sign else 0):
        ids, labels = labelled(tokenizer, conversation(number, sign)["messages"])
        network(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.config.eos_token_id = network.generation_config.eos_token_id = ends
    network.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    tokenizer.pad_token = "<|im_end|>"
    save_model(tmp_path / "base", "", tokenizer)
    save_model(tmp_path / "talk", "a", tokenizer)
    save_model(tmp_path / "sums", "b", tokenizer, OTHER)
    tasks: dict[str, Any] = {}
    for name, sign in (("talk", "a"), ("sums", "b")):
        write_rows(tmp_path / f"{name}.jsonl", [conversation(number, sign) for number in range(12)])
        source = {"path": "json", "data_files": f"{name}.jsonl"}
        task = {"kind": "chat", "calibration": source | {"samples": 6}, "evaluation": source, "loss_on": "all"}
        tasks[name] = task | {"generate": 5}
    return {
        "name": "chats",
        "base": "base",
        "experts": {"talk": {"model": "talk"}, "sums": {"model": "sums"}},
        "tasks": tasks,
        "merges": {
            "ta": {"method": "task_arithmetic", "weight": 0.5},
            "sens": {"method": "ties", "coefficients": {"kind": "sens"}},
            "se": {"method": "task_arithmetic", "weight": 0.5, "application": {"kind": "se"}},
        },
    }


def assert_sensitivities(plan: Plan, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Σ |θ · ∂L/∂θ| by layer, L the mean over all that the assistant says."""
    network = AutoModelForCausalLM.from_pretrained(folder / "talk", dtype=torch.float64)
    rows = plan.inputs.data["talk"].calibration
    total: dict[str, float] = {}
    for row in rows:
        ids, labels = labelled(tokenizer, row["messages"])
        network.zero_grad()
        network(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        for name, parameter in network.named_parameters():
            layer = ".".join(name.split(".")[:3]) if ".layers." in name else name.removesuffix(".weight")
            assert parameter.grad is not None
            total[layer] = total.get(layer, 0.0) + float((parameter * parameter.grad).abs().sum()) / len(rows)
    found = read_layers(plan.artifact("statistics", "talk"), "sensitivity")
    assert found.keys() == total.keys()
    assert found == pytest.approx(total, rel=1e-4)


def test_from_rows_to_scores(recipe: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(tmp_path, recipe)
    do_steps(plan)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert_sensitivities(plan, tmp_path, tokenizer)
    dynamic = read_json(plan.artifact("evaluate", "se") / "scores.json")
    found = [dynamic[task] for task in ("talk", "sums")]
    for model in ("base", "talk", "sums", "ta", "sens"):
        for task in ("talk", "sums") if model not in recipe["experts"] else (model,):
            found.append(read_json(plan.artifact("evaluate", f"{model}/{task}") / "scores.json"))
    for scores in found:
        assert scores.keys() == {"token_accuracy", "perplexity", "exact_match"}
        assert {score["n"] for score in scores.values()} == {6}
    exact = [scores["exact_match"]["value"] for scores in found]
    assert exact[2:6] == [0, 0, 1, 1]  # the base, and each expert on its own task
    assert exact[0] + exact[1] > exact[6] + exact[7]  # the dynamic merge, and the static one
    assert read_json(plan.artifact("evaluate", "se") / "routes.json")["identification"]["n"] == 12

    folder = plan.artifact("merge", "ta")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    carried = AutoTokenizer.from_pretrained(folder)
    assert carried.chat_template == CHATML
    records = read_json(plan.artifact("evaluate", "ta/sums") / "records.json")
    for row, record in zip(plan.inputs.data["sums"].evaluation, records, strict=True):
        *before, answer = row["messages"]
        asked = carried.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt")
        said = merged.generate(**asked, max_new_tokens=5, do_sample=False)[0, asked["input_ids"].shape[1] :]
        text = carried.decode(said, skip_special_tokens=True)
        assert record["answer"] == text
        assert record["exact"] == int(text.strip() == answer["content"])
        assert record["tokens"] == len(tokenizer(answer["content"]).input_ids) + 1

    table = answers(plan)
    assert {(row["answer"], row["right"]) for row in table["sums"]["sums"].rows} == {("b seven", True)}
    assert table.keys() == {"base", "talk", "sums", "ta", "sens", "se"}
    assert [row["answer"] for row in table["ta"]["sums"].rows] == [record["answer"] for record in records]
    first = plan.inputs.data["sums"].evaluation[0]["messages"]
    assert table["se"]["sums"].rows[0] | {"answer": "", "right": False} == {
        "prompt": "\n".join(f"{one['role']}: {one['content']}" for one in first[:-1]),
        "expected": first[-1]["content"],
        "answer": "",
        "right": False,
    }

    said = [note for note in plan.inputs.notes if "chat template" in note]
    assert any("experts.sums has another" in note for note in said)
    assert any(note.startswith("tasks.sums: its rows are written in the chat template that merged") for note in said)
    assert not any(note.startswith("tasks.talk") for note in said)


def test_a_tokenizer_of_an_expert_s_own_writes_conversations_as_merged_models_do(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The expert numbers its tokens in its own way, and has other templates and special tokens."""
    form = replace(FORMS["chatml"], tokens=("<more>", *FORMS["chatml"].tokens))
    other = chat_tokenizer(form)
    other.bos_token = "<more>"
    save_model(tmp_path / "sums", "b", other, "{{ bos_token }}" + OTHER)
    template = "{{ bos_token }}" + CHATML
    plan = plan_of(tmp_path, recipe | {"tokenizer": {"chat_template": template}})
    reader, carried = (load_tokenizer(one.folder) for one in (plan.inputs.tokenizer.of("sums"), plan.inputs.tokenizer))
    assert reader.get_vocab() != carried.get_vocab()
    messages = conversation(1, "b")["messages"]
    own, expected = (
        ChatTask(kind="chat").sample({"messages": messages}, one, "row 1").input_ids for one in (reader, carried)
    )
    assert own == expected
    assert "You add." not in carried.decode(own)
    assert any(note.startswith("tasks.sums: its rows are written in the chat template") for note in plan.inputs.notes)
    assert not any("it reads what the text is spelled with" in note for note in plan.inputs.notes)
    changed = plan_of(tmp_path, recipe | {"tokenizer": {"chat_template": template + " "}})
    assert changed.step("statistics", "sums").key != plan.step("statistics", "sums").key


def test_a_tokenizer_without_the_tokens_of_the_chat_template(recipe: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path / "sums", "", chat_tokenizer(replace(FORMS["chatml"], tokens=("<|im_end|>",))))
    notes = plan_of(tmp_path, recipe).inputs.notes
    said = "experts.sums has no token '<|im_start|>', which the chat template of merged models writes"
    assert any(said in note for note in notes)


def test_a_row_that_cannot_be_read_ends_the_plan(recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [conversation(number, "a") for number in range(12)]
    rows[3]["messages"][1]["content"] = None
    write_rows(tmp_path / "talk.jsonl", rows)
    with pytest.raises(InputError) as error:
        plan_of(tmp_path, recipe)
    line = f"line 4 of {tmp_path / 'talk.jsonl'}: messages[1].content is None, expected a text"
    assert str(error.value) == line
    for step in ("merge", "statistics"):
        assert not list(tmp_path.glob(f"store/**/{step}*"))


def test_models_without_a_chat_template(recipe: dict[str, Any], tmp_path: Path) -> None:
    for name in ("base", "talk", "sums"):
        (tmp_path / name / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"^tasks\.talk\.calibration: line \d+ of .*: the tokenizer of merged models "):
        plan_of(tmp_path, recipe)
