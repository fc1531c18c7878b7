"""Champion and challenger: refreshes on a real Ray cluster with a real MLflow registry."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sensmerge.pipeline.tracking.registry import ModelRegistry, parse_version
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.stages.evaluate import evaluate_network
from tests.conftest import command_line, make_llama, perturbed, write_recipe, write_rows
from tests.pipeline.test_webhook import chat as chat

TEXTS = {"math": "one plus one is two", "code": "print the answer"}


def trained(tokenizer: PreTrainedTokenizerFast, text: str, steps: int) -> LlamaForCausalLM:
    """Fine-tune the tiny Llama to go on with a text after `x`."""
    network = make_llama()
    ids = torch.tensor([tokenizer(f"x{text}")["input_ids"]])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        network(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


@pytest.mark.ray
def test_only_what_is_not_worse_becomes_champion(
    save: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    ray_address: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    chat: tuple[str, list[tuple[str, str, Any]]],
) -> None:
    save(make_llama(), "base", tmp_path)
    for name, text in TEXTS.items():
        save(trained(tokenizer, text, 20), name, tmp_path)
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "x", "completion": text}] * 4)
    recipe = write_recipe(
        tmp_path,
        {
            "name": "pair",
            "base": "base",
            "experts": {name: {"model": name} for name in TEXTS},
            "tasks": {
                name: {
                    "kind": "completion",
                    "evaluation": {"path": "json", "data_files": f"{name}.jsonl"},
                    "metric": "perplexity",
                }
                for name in TEXTS
            },
            "merges": {"ta": {"method": "task_arithmetic", "weight": 0.6}},
            "gate": {"metric": "math/perplexity", "tolerance": 0.05},
        },
    )
    store = tmp_path / "store"
    options = ("--store", store, "--address", ray_address)
    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    registry = ModelRegistry(f"sqlite:///{store / 'mlflow.db'}", "pair")

    def aliases() -> dict[str, str]:
        return {alias: str(number) for alias, number in client.get_registered_model("pair").aliases.items()}

    # What `run` makes has not passed the gate; the next refresh has it pass, and runs nothing.
    assert command_line("run", recipe, *options) == 0
    assert registry.champion() is None
    assert command_line("refresh", recipe, "--store", store, "--address", "no such cluster") == 0
    assert re.search(r"pair/1 \(ta\) is the first champion: math/perplexity \d+\.\d+ \[", capsys.readouterr().out)
    assert aliases() == {"champion": "1"}

    # What those load who deploy it gives the very answers that it was scored by.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    champion, rows = (
        registry.champion(),
        {name: [{"prompt": "x", "completion": text}] * 4 for name, text in TEXTS.items()},
    )
    assert champion is not None
    pipeline = mlflow.transformers.load_model("models:/pair@champion")
    served = mlflow.pyfunc.load_model("models:/pair@champion").get_raw_model()
    for network in (pipeline.model, served.network()):
        for name, outcome in registry.outcomes(champion).items():
            records = evaluate_network(network, tokenizer, CompletionTask(kind="completion"), rows[name], name)
            assert records == outcome.records
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    # A worse expert. A chat is told, once.
    url, posted = chat
    monkeypatch.setenv("SENSMERGE_WEBHOOK", f"{url}/services/secret")
    save(perturbed(trained(tokenizer, TEXTS["math"], 20), 1, scale=0.2), "math", tmp_path)
    assert command_line("refresh", recipe, *options) == 3
    said = capsys.readouterr().out
    assert "math: 1 of 5 files changed" in said
    assert "pair/2 (ta) stays challenger, pair/1 (ta) stays champion" in said
    assert aliases() == {"champion": "1", "challenger": "2"}
    ((_, _, told),) = posted
    assert told["lines"][-1].startswith(
        "pair/2 (ta) stays challenger, pair/1 (ta) stays champion; more evaluation rows"
    )
    assert told["lines"][-1].endswith("`sensmerge promote pair/2` skips the gate")
    assert "secret" not in said
    tags = client.get_model_version("pair", "2").tags
    assert tags["gate"].startswith("refused against version 1: math")
    assert tags["gate/math"].startswith("perplexity ")
    assert ", n = 4: failed (the interval's worse end, " in tags["gate/math"]
    assert command_line("refresh", recipe, "--store", store, "--address", "no such cluster") == 0
    assert "pair: nothing changed\n" in capsys.readouterr().out
    assert aliases() == {"champion": "1", "challenger": "2"}
    assert len(posted) == 1
    # Another gate is asked again.
    assert command_line("refresh", recipe, *options, "--set", "gate.tolerance=0.01", "--refused-exit-status", "0") == 0
    assert "pair/2 (ta) stays challenger, pair/1 (ta) stays champion" in capsys.readouterr().out

    # Better ones.
    for name, text in TEXTS.items():
        save(trained(tokenizer, text, 60), name, tmp_path)
    assert command_line("refresh", recipe, *options) == 0
    assert "pair/3 (ta) is champion, replacing pair/1 (ta)" in capsys.readouterr().out
    assert aliases() == {"champion": "3"}

    # By hand.
    assert command_line("compare", "pair@champion", "pair/2", "--store", store) == 0
    shown = capsys.readouterr().out
    assert "A: pair@champion, pair/3 (ta)" in shown
    assert "B: pair/2 (ta)" in shown
    assert shown.count("perplexity") == len(TEXTS)
    assert command_line("rollback", "pair", "--store", store) == 0
    assert "pair/1 (ta) is champion again, instead of pair/3 (ta)" in capsys.readouterr().out
    assert aliases()["champion"] == "1"
    assert command_line("rollback", "pair", "--store", store) == 2
    assert "pair: no champion before version 1 to go back to" in capsys.readouterr().err
    assert command_line("promote", "pair/2", "--store", store) == 0
    assert aliases() == {"champion": "2"}
    outcomes = registry.outcomes(registry.find("2"))
    assert [len(one.records) for one in outcomes.values()] == [4, 4]

    # The champion's weights are gone, and nothing changed since: the best variant passes the gate beside it.
    idle = ("--store", store, "--address", "no such cluster")
    weights = {number: weights_of(client, "pair", number) for number in ("2", "3")}
    shutil.move(weights["2"], tmp_path / "kept")
    assert command_line("refresh", recipe, *idle) == 0
    said = capsys.readouterr().out
    assert f"pair/2 (ta) is champion, but can no longer be loaded: {weights['2']} is not there" in said
    assert "pair/3 (ta) is champion, replacing pair/2 (ta)" in said
    for arguments in (("promote", "pair/2"), ("rollback", "pair"), ("compare", "pair/2", "pair/3")):
        assert command_line(*arguments, "--store", store) == 2
        assert re.fullmatch(
            rf"error: pair/2 \(ta\): {weights['2']} is not there; run the recipe .*\n", capsys.readouterr().err
        )
    assert aliases() == {"champion": "3"}

    # What the recipe still makes is made anew.
    weights["3"].write_bytes(b"cut")
    assert command_line("promote", "pair/3", "--store", store) == 2
    assert f"{weights['3']} has 3 bytes instead of" in capsys.readouterr().err
    assert command_line("refresh", recipe, *options) == 0
    assert "pair/3 (ta) stays champion" in capsys.readouterr().out
    assert command_line("promote", "pair/3", "--store", store) == 0

    # Nothing worse becomes champion unasked.
    shutil.move(tmp_path / "kept", weights["2"])
    save(perturbed(trained(tokenizer, TEXTS["math"], 20), 1, scale=0.2), "math", tmp_path)
    save(trained(tokenizer, TEXTS["code"], 20), "code", tmp_path)
    assert command_line("refresh", recipe, *options) == 3
    weights["3"].unlink()
    capsys.readouterr()
    assert command_line("refresh", recipe, *idle) == 3
    said = capsys.readouterr().out
    assert f"pair/3 (ta) is champion, but can no longer be loaded: {weights['3']} is not there" in said
    assert "pair/2 (ta) stays challenger, pair/3 (ta) stays champion; more evaluation rows" in said
    assert "`sensmerge promote pair/2` gets a champion that loads" in said
    assert aliases() == {"champion": "3", "challenger": "2"}


def weights_of(client: MlflowClient, recipe: str, number: str) -> Path:
    folder = client.get_model_version(recipe, number).tags["folder"]
    return Path(urlparse(folder).path) / "model.safetensors"


@pytest.mark.parametrize(("text", "expected"), [("a@champion", ("a", "champion")), ("smol-2.5/17", ("smol-2.5", "17"))])
def test_versions_as_they_are_named(text: str, expected: tuple[str, str]) -> None:
    assert parse_version(text) == expected


@pytest.mark.parametrize("text", ["a", "a/", "a@", "a/x", "a@1", "a b/1", "a/1/2"])
def test_what_names_no_version(text: str) -> None:
    with pytest.raises(InputError, match=r"expected RECIPE@ALIAS or RECIPE/NUMBER"):
        parse_version(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compare", "nobody@champion", "nobody/1"), "nobody@champion: no version has this alias"),
        (("promote", "nobody/7"), "nobody/7: no such version"),
        (("rollback", "nobody"), "nobody: no champion to go back to"),
    ],
)
def test_versions_that_do_not_exist(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(*arguments, "--store", tmp_path) == 2
    assert said in capsys.readouterr().err
