import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import fsspec
import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

from sensmerge.pipeline.report.answers import Answers
from sensmerge.pipeline.report.gate import Best, Outcomes
from sensmerge.pipeline.report.report import Report, RouteInfo, StageRecord, VariantInfo
from sensmerge.pipeline.report.results import TaskData
from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking import record as tracking
from sensmerge.pipeline.tracking.metrics import metrics_of
from sensmerge.pipeline.tracking.runs import tags_of, where_recorded
from sensmerge.pipeline.tracking.system_metrics import Load
from sensmerge.pipeline.tracking.uri import check_server, default_uri
from sensmerge.tasks.artifacts import Artifact, read_json
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError, StepError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.scores import Score
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.stages.route import RouteJob
from tests.conftest import llama_config, row_set
from tests.tasks.stages.test_merge import make_job
from tests.tasks.stages.test_merge_vectors import of_vectors

MODELS = {"base": "base", "math": "expert", "code": "expert", "ta": "variant", "ta-sens.3": "variant"}
EMPTY = {"models": {}, "tasks": {}, "scores": {}, "mean_normalised": {}, "variants": {}}
RECIPE = "name: two-skills\n"
PLAN = "merge ta RUN\n"
RIGHT = {"label": 1, "prediction": 1}
OUTCOMES = {
    "ta": {"math": Outcomes(kind="classification", metric="accuracy", samples="a", records=[RIGHT, RIGHT])},
}


def score(value, n=50):
    return Score(value=value, n=n, low=value - 0.1, high=value + 0.1)


def scores(value):
    return {
        task: {"accuracy": score(value + shift), "macro_f1": score(value + shift / 2, 49)}
        for task, shift in (("math", 0.02), ("code", 0.04))
    }


def make_report(folder, recipe="two-skills", **changes):
    """A report of two experts, one of which was not scored on the other's task."""
    for name in ("ta", "ta-sens.3"):
        llama_config(architectures=["LlamaForCausalLM"]).save_pretrained(folder / name)
    taken = {name: scores(0.2 + 0.1 * i) for i, name in enumerate(MODELS)}
    del taken["math"]["code"]
    uniform = {layer: {"math": 0.4, "code": 0.4} for layer in ("embed", "layer.0", "head")}
    sens = {"embed": {"math": 0.41, "code": 0.39}, "layer.0": {"math": 0.38, "code": 0.42}, "head": uniform["head"]}
    fields = {
        "recipe": recipe,
        "stages": [],
        "models": {name: str(folder / name) for name in MODELS},
        "uris": {name: (folder / name).resolve().as_uri() for name in MODELS},
        "roles": MODELS,
        "digests": {name: hashlib.sha256(name.encode()).hexdigest() for name in ("base", "math", "code")},
        "tasks": {"math": "accuracy", "code": "accuracy"},
        "kinds": {"math": "classification", "code": "classification"},
        "scores": taken,
        "mean_normalised": {"base": score(0.3), "ta": score(0.8), "ta-sens.3": score(0.9)},
        "variants": {
            "ta": VariantInfo(
                method="task_arithmetic",
                params={"method": "task_arithmetic", "weight": "0.4", "coefficients.kind": "uniform"},
                weights=uniform,
                digest="1" * 64,
            ),
            "ta-sens.3": VariantInfo(
                method="task_arithmetic",
                params={"method": "task_arithmetic", "weight": "0.4", "coefficients.kind": "sens"},
                weights=sens,
                tau={"math": 0.25, "code": 0.75},
                sigma={layer: {expert: w / 0.8 for expert, w in row.items()} for layer, row in sens.items()},
                digest="2" * 64,
            ),
        },
        "distances": {"math": {"code": 3.0}, "code": {"math": 1.0}},
    }
    return Report(**(fields | changes))


def make_datasets():
    return [
        TaskData(
            task=task,
            context=context,
            source=DataSource(path="json", data_files=f"{task}/{context}.jsonl", split="train"),
            digest=hashlib.sha256(f"{task} {context}".encode()).hexdigest(),
            rows=rows,
        )
        for task in ("math", "code")
        for context, rows in (("calibration", 8), ("evaluation", 50))
    ]


@contextlib.contextmanager
def captured():
    """Everything that Python code writes to the terminal."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def record(report, store, uri, load=()):
    run = tracking.record(tracking.Execution(report, OUTCOMES, RECIPE, PLAN, make_datasets(), load), uri, store)
    return run.rsplit("/", 1)[-1]


def children(client, parent):
    experiment = client.get_run(parent).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.info.run_name: run for run in runs}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("a store")


@pytest.fixture(scope="module")
def uri(store):
    return default_uri(Store(store))


@pytest.fixture(scope="module")
def client(uri):
    return MlflowClient(uri, uri)


@pytest.fixture(scope="module")
def report(store):
    return make_report(store)


@pytest.fixture(scope="module")
def chatter():
    return []


@pytest.fixture(scope="module")
def parent(report, store, uri, chatter):
    check_server(uri)
    with captured() as text:
        run = record(report, store, uri)
    chatter.append(text.getvalue())
    return run


def test_an_execution_is_a_parent_run_with_a_child_per_model(client, parent, store):
    run = client.get_run(parent)
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.name == "two-skills"
    assert experiment.artifact_location == (store / "mlartifacts").as_uri()
    assert run.info.run_name.startswith("two-skills 20")
    assert run.info.run_name.endswith(" UTC")
    assert run.info.status == "FINISHED"
    runs = children(client, parent)
    assert {name: child.data.tags["role"] for name, child in runs.items()} == MODELS
    assert all(child.info.status == "FINISHED" and child.info.end_time for child in runs.values())


def test_metrics_have_the_same_keys_in_every_child(client, parent, report):
    runs = children(client, parent)
    main = ["mean_normalised", "math/accuracy", "code/accuracy"]
    more = ["math/macro_f1", "code/macro_f1"]
    keys = {f"eval/{name}" for name in main} | {f"more/{name}" for name in more}
    keys |= {f"{kind}/{name}" for name in [*main, *more] for kind in ("low", "high", "n")}
    # What people look for first comes first by name too.
    assert sorted(keys)[:3] == sorted(f"eval/{name}" for name in main)
    assert {name: set(run.data.metrics) for name, run in runs.items()} == dict.fromkeys(MODELS, keys)
    for model, tasks in report.scores.items():
        logged = runs[model].data.metrics
        for task, metrics in tasks.items():
            for metric, taken in metrics.items():
                name = f"{task}/{metric}"
                group = "eval" if metric == report.tasks[task] else "more"
                found = [logged[f"{kind}/{name}"] for kind in (group, "low", "high", "n")]
                assert found == [taken.value, taken.low, taken.high, taken.n]
    assert runs["ta"].data.metrics["eval/mean_normalised"] == 0.8
    assert math.isnan(runs["math"].data.metrics["eval/code/accuracy"])
    assert runs["math"].data.metrics["n/code/accuracy"] == 0
    assert math.isnan(runs["code"].data.metrics["eval/mean_normalised"])


def test_only_models_with_routes_have_routed_metrics(report):
    routed = {"math": scores(0.5)["math"] | {"routed_accuracy": score(0.4)}}
    some = report.model_copy(update={"scores": report.scores | {"ta": report.scores["ta"] | routed}})
    plain = metrics_of(report, "ta-sens.3")
    assert metrics_of(some, "ta-sens.3").keys() == plain.keys()
    more = {f"{kind}/math/routed_accuracy" for kind in ("more", "low", "high", "n")}
    assert metrics_of(some, "ta").keys() - plain.keys() == more


def test_params_tell_method_and_coefficients(client, parent, store):
    runs = children(client, parent)
    assert runs["ta-sens.3"].data.params == {
        "role": "variant",
        "method": "task_arithmetic",
        "weight": "0.4",
        "coefficients.kind": "sens",
        "tau.math": "0.25",
        "tau.code": "0.75",
        "weights.math": "0.38 … 0.41",
        "weights.code": "0.39 … 0.42",
    }
    assert runs["ta"].data.params["weights.math"] == "0.4"
    assert runs["math"].data.params == {"role": "expert"}


def test_tags_tell_where_a_model_lies(client, parent, store):
    runs = children(client, parent)
    for name, digest in (("ta-sens.3", "2" * 64), ("math", hashlib.sha256(b"math").hexdigest())):
        tags = runs[name].data.tags
        assert (tags["folder"], tags["digest"]) == ((store / name).as_uri(), digest)


def test_inputs_are_the_data_sets_a_model_has_seen(client, parent):
    def inputs(run):
        return {
            (entry.dataset.name, entry.dataset.digest, tag.value)
            for entry in run.inputs.dataset_inputs
            for tag in entry.tags
            if tag.key == "mlflow.data.context"
        }

    every = {(f"{d.task}/{d.context}", d.digest[:36], d.context) for d in make_datasets()}
    evaluation = {entry for entry in every if entry[2] == "evaluation"}
    runs = children(client, parent)
    assert inputs(client.get_run(parent)) == inputs(runs["ta-sens.3"]) == every
    assert all(inputs(runs[name]) == evaluation for name in ("base", "math", "code", "ta"))

    (entry,) = [e for e in runs["ta"].inputs.dataset_inputs if e.dataset.name == "math/evaluation"]
    assert json.loads(entry.dataset.profile) == {"num_rows": 50}
    source = mlflow.data.get_source(mlflow.data.meta_dataset.MetaDataset(_source(entry.dataset)))
    assert (source.path, source.data_files, source.split) == ("json", "math/evaluation.jsonl", "train")


def _source(dataset):
    assert dataset.source_type == "hugging_face"
    return mlflow.data.huggingface_dataset_source.HuggingFaceDatasetSource.from_json(dataset.source)


def assert_models(client, runs, store, source):
    """Each variant is a LoggedModel that names its folder, and a version of the recipe's registered model."""
    versions = {v.tags["variant"]: v for v in client.search_model_versions("name = 'two-skills'")}
    assert set(versions) == {"ta", "ta-sens.3"}
    for name, digest in (("ta", "1" * 64), ("ta-sens.3", "2" * 64)):
        run, version = runs[name], versions[name]
        (output,) = run.outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        folder = (store / name).as_uri()
        assert model.status == "READY"
        assert model.source_run_id == run.info.run_id
        assert (model.tags["folder"], model.tags["digest"]) == (folder, digest)
        assert model.tags["kind"] == version.tags["kind"] == "static"
        assert model.params["method"] == "task_arithmetic"
        assert {m.key for m in model.metrics} == set(run.data.metrics)
        link = {"name": "two-skills", "version": str(version.version)}
        assert json.loads(model.tags["mlflow.modelVersions"]) == [link]
        assert (version.tags["folder"], version.tags["digest"]) == (folder, digest)
        assert version.run_id == run.info.run_id
        assert version.source == source(model)
    assert not any(runs[name].outputs.model_outputs for name in ("base", "math", "code"))


def test_a_variant_is_a_logged_model_and_a_registered_version_that_point_at_its_folder(client, parent, store):
    assert_models(client, children(client, parent), store, lambda model: model.artifact_location)
    assert [path.name for path in (store / "ta").iterdir()] == ["config.json"]  # nothing was copied to or from it


def test_artifacts_of_the_execution_are_on_the_parent(client, parent, report):
    names = {artifact.path for artifact in client.list_artifacts(parent)}
    assert names == {"recipe.yaml", "plan.txt", "report.json", "scores.json", "scores.png", "distances.png"}
    uri = client.get_run(parent).info.artifact_uri
    assert mlflow.artifacts.load_text(f"{uri}/recipe.yaml") == RECIPE
    assert mlflow.artifacts.load_text(f"{uri}/plan.txt") == PLAN
    assert Report.model_validate_json(mlflow.artifacts.load_text(f"{uri}/report.json")) == report
    assert mlflow.artifacts.load_image(f"{uri}/scores.png").width > 500


def test_only_variants_have_a_picture_of_coefficients(client, parent):
    paths = {
        name: [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
        for name, run in children(client, parent).items()
    }
    picture = {name: ["coefficients.png"] if role == "variant" else [] for name, role in MODELS.items()}
    assert paths == picture | {"ta": ["coefficients.png", "outcomes.json"]}


def test_answers_of_a_model_are_a_table_that_people_read(client, report, store, uri):
    said = [
        {"prompt": "user: how many?", "expected": "72", "answer": "$72.0", "right": True},
        {"prompt": "user: and\nnow? é", "expected": "7", "answer": "", "right": False},
    ]
    execution = tracking.Execution(
        *(report, OUTCOMES, RECIPE, PLAN, make_datasets()),
        answers={"math": {"math": Answers(said, 2)}, "ta": {"math": Answers(said[:1], 2000)}},
    )
    runs = children(client, tracking.record(execution, uri, store).rsplit("/", 1)[-1])
    for name, rows in (("math", said), ("ta", said[:1])):
        table = json.loads(mlflow.artifacts.load_text(f"{runs[name].info.artifact_uri}/answers/math.json"))
        assert table["columns"] == ["prompt", "expected", "answer", "right"]
        assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == rows
    assert not client.list_artifacts(runs["base"].info.run_id)
    tags = {name: runs[name].data.tags.get("answers.math") for name in ("math", "ta")}
    assert tags == {"math": None, "ta": "the first 1 of 2000 rows"}


def test_the_table_of_scores_is_written_once(client, parent, report):
    # MLflow stores a table as pandas does with orient="split".
    table = json.loads(mlflow.artifacts.load_text(f"{client.get_run(parent).info.artifact_uri}/scores.json"))
    assert table["columns"] == ["model", "role", "task", "metric", "value", "low", "high", "n"]
    rows = {(model, task, metric): (role, *rest) for model, role, task, metric, *rest in table["data"]}
    taken = {
        (model, task, metric): (MODELS[model], found.value, found.low, found.high, found.n)
        for model, tasks in report.scores.items()
        for task, metrics in tasks.items()
        for metric, found in metrics.items()
    }
    assert len(table["data"]) == len(taken) == 5 * 2 * 2 - 2
    assert rows == {key: pytest.approx(values) for key, values in taken.items()}


def test_the_terminal_stays_clean(parent, chatter):
    assert chatter == [""]


def test_no_global_state_is_left_behind(dynamic_report, store, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "false")

    def state():
        settings = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")
        return [os.environ.get(name) for name in settings], mlflow.get_tracking_uri(), logging.getLogger("mlflow").level

    before = state()
    record(make_report(store, "stateless", **EMPTY), store, uri)
    record(dynamic_report.model_copy(update={"recipe": "stateless"}), store, uri)
    assert state() == before
    assert mlflow.get_tracking_uri() != uri


def test_a_second_execution_is_a_new_run_and_registers_only_what_is_new(client, store, uri):
    first = record(make_report(store, "nightly"), store, uri)
    report = make_report(store, "nightly")
    report.variants["ta"].digest = "3" * 64
    second = record(report, store, uri)
    assert first != second
    assert client.get_run(first).info.experiment_id == client.get_run(second).info.experiment_id
    found = {(v.tags["variant"], v.tags["digest"][0]): v for v in client.search_model_versions("name = 'nightly'")}
    assert set(found) == {("ta", "1"), ("ta-sens.3", "2"), ("ta", "3")}
    assert found["ta-sens.3", "2"].run_id == children(client, first)["ta-sens.3"].info.run_id
    # The model of the second run is linked to the version that was there.
    (output,) = children(client, second)["ta-sens.3"].outputs.model_outputs
    (link,) = json.loads(client.get_logged_model(output.model_id).tags["mlflow.modelVersions"])
    assert link["version"] == str(found["ta-sens.3", "2"].version)


def test_an_experiment_deleted_in_the_ui_is_used_again(client, store, uri):
    report = make_report(store, "tidied", **EMPTY)
    experiment = client.get_run(record(report, store, uri)).info.experiment_id
    client.delete_experiment(experiment)
    assert client.get_run(record(report, store, uri)).info.experiment_id == experiment
    assert client.get_experiment(experiment).lifecycle_stage == "active"


def test_a_recipe_without_tasks_has_runs_without_metrics(client, store, uri):
    report = make_report(store, "no-tasks", tasks={}, scores={}, mean_normalised={}, distances={})
    parent = record(report, store, uri)
    runs = children(client, parent)
    assert set(runs) == set(MODELS)
    assert not any(run.data.metrics for run in runs.values())
    assert {a.path for a in client.list_artifacts(parent)} == {"recipe.yaml", "plan.txt", "report.json"}


def test_runs_that_a_killed_process_left_open_are_ended(client, store, uri):
    experiment = client.create_experiment("killed", (store / "mlartifacts").as_uri())
    own = client.create_run(experiment, tags={"role": "recipe"} | tags_of(store)).info.run_id
    child = client.create_run(experiment, tags={"mlflow.parentRunId": own}).info.run_id
    done = client.create_run(experiment, tags={"mlflow.parentRunId": own}).info.run_id
    client.set_terminated(done)
    other = client.create_run(experiment, tags={"role": "recipe"} | tags_of(Path(f"{store}2"))).info.run_id
    elsewhere = client.create_run(experiment, tags=tags_of(store) | {"machine": "another"}).info.run_id
    parent = record(make_report(store, "killed"), store, uri)
    found = {run: client.get_run(run).info.status for run in (own, child, done, other, elsewhere, parent)}
    assert found == {
        own: "KILLED",
        child: "KILLED",
        done: "FINISHED",
        other: "RUNNING",
        elsewhere: "RUNNING",
        parent: "FINISHED",
    }


def test_a_run_is_there_from_the_start_and_has_the_scores_of_the_best_at_its_end(client, store, uri):
    run = tracking.begin("from-start", RECIPE, PLAN, uri, store)
    begun = client.get_run(run)
    assert begun.info.status == "RUNNING"
    assert {a.path for a in client.list_artifacts(run)} == {"recipe.yaml", "plan.txt"}
    report = make_report(store, "from-start")
    best = Best("ta", score(0.7, 25), "best of 2 variants: ta, …")
    execution = tracking.Execution(report, OUTCOMES, RECIPE, PLAN, make_datasets(), best=best)
    assert tracking.record(execution, uri, store, run) == run
    ended = client.get_run(run)
    assert ended.info.status == "FINISHED"
    assert ended.info.start_time == begun.info.start_time
    assert (ended.data.tags["best"], ended.data.tags["choice"]) == ("ta", best.said)
    own = children(client, run)
    child = own["ta"]
    held_out = {f"{key}held_out": child.data.metrics[f"{key}held_out"] for key in ("eval/", "low/", "high/", "n/")}
    assert held_out == pytest.approx(
        {"eval/held_out": 0.7, "low/held_out": 0.6, "high/held_out": 0.8, "n/held_out": 25}
    )
    assert [name for name, one in own.items() if "eval/held_out" in one.data.metrics] == ["ta"]
    assert {key: str(value) for key, value in ended.data.metrics.items()} == {
        key: str(value) for key, value in child.data.metrics.items()
    }
    tracking.log_verdict(uri, run, False, ["gate, math: worse", "from-start/2 stays challenger"])
    told = client.get_run(run).data
    assert (told.tags["gate"], told.metrics["gate/passed"]) == ("refused", 0.0)
    assert told.tags["mlflow.note.content"] == "gate, math: worse\n\nfrom-start/2 stays challenger"


def step(name, seconds, stage="merge"):
    return StageRecord(
        stage=stage,
        name=name,
        status="run",
        seconds=seconds,
        bytes=1,
        peak_memory=1,
        pieces=1,
        pieces_run=1,
        node="",
        artifact="",
        fingerprint="",
    )


def test_runs_of_models_last_as_long_as_the_work_on_them(client, store, uri):
    steps = [step("ta", 30), step("ta/math", 12.5, "evaluate"), step("ta-sens.3", 7), step("base", 0.25, "download")]
    runs = children(client, record(make_report(store, "timed", stages=steps), store, uri))
    took = {name: run.info.end_time - run.info.start_time for name, run in runs.items()}
    assert took == {"ta": 42_500, "ta-sens.3": 7_000, "base": 250, "math": 0, "code": 0}
    now = 1000 * time.time()
    assert all(now - 60_000 < run.info.end_time <= now for run in runs.values())


def test_a_version_and_its_run_show_the_model_card(client, store, uri, tmp_path):
    report = make_report(tmp_path, "shown")
    card = "---\ntags: [merge]\n---\n# shown: ta\n\n## Scores\n\n0.8\n\n## Recipe\n\n```yaml\nname: shown\n```\n"
    (tmp_path / "ta" / "README.md").write_text(card)
    run = children(client, record(report, store, uri))["ta"]
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/README.md") == card.removeprefix(
        "---\ntags: [merge]\n---\n"
    )
    assert run.data.tags["mlflow.note.content"] == "# shown: ta\n\n## Scores\n\n0.8\n"
    (version,) = client.search_model_versions("name = 'shown' AND tags.variant = 'ta'")
    said = version.description
    assert said.startswith("Static: ")
    assert "\n\nMerged by method task_arithmetic, weight 0.4, coefficients.kind uniform.\n\n" in said
    assert "\n- math, accuracy: 0.520 [0.420, 0.620], n = 50; its own expert 0.320\n" in said
    assert "\n- code, accuracy: 0.540 [0.440, 0.640], n = 50; its own expert 0.440\n" in said
    assert "\n- mean of score ÷ own expert's: 0.800 [0.700, 0.900], n = 50\n" in said
    page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    assert said.endswith(f"Its [run]({page}) has more, such as its [model card]({page}/artifacts/README.md).")


def test_scores_that_no_description_can_hold_are_left_to_the_run(client, store, uri):
    tasks = {f"task-{number:03}": "accuracy" for number in range(90)}
    report = make_report(store, "wide", tasks=tasks, scores={"ta": {task: {"accuracy": score(0.5)} for task in tasks}})
    record(report, store, uri)
    (version,) = client.search_model_versions("name = 'wide' AND tags.variant = 'ta'")
    assert len(version.description) < 5000
    assert "task-000" not in version.description
    assert "/artifacts/README.md)." in version.description


def test_an_experiment_is_shown_as_one_of_models(client, parent):
    """Otherwise MLflow's pages are those for traces of language models."""
    tags = client.get_experiment(client.get_run(parent).info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_whose_steps_do_not_end_well_says_why(status, client, store, uri):
    run = tracking.begin(f"ended-{status}", RECIPE, PLAN, uri, store)
    tracking.end(uri, run, status, "x" * 9000)
    found = client.get_run(run)
    assert found.info.status == status
    assert found.data.tags["reason"] == "x" * 4000


def test_nobody_is_told_where_there_is_no_server():
    tracking.end("http://127.0.0.1:9", "0" * 32, "FAILED", "it failed")


def test_what_fails_leaves_no_run_running(client, store, uri):
    # MLflow refuses this key, after parent and child were opened.
    report = make_report(store, "broken", tasks={"a#b": "accuracy"}, scores={"base": {"a#b": {"accuracy": score(0.5)}}})
    with pytest.raises(StepError, match=r"MLflow at .* failed: .*a#b"):
        record(report, store, uri)
    runs = client.search_runs([client.get_experiment_by_name("broken").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]


# Dynamic models -------------------------------------------------------------------------------------------------------


def make_dynamic(models, calibration, folder):
    """A real dynamic model of tiny networks: its folder, and what stage route returns."""
    job = of_vectors(make_job(folder, models["base"], {name: models[name] for name in calibration}))
    merged, out = folder / "merged", folder / "dynamic"
    merged.mkdir()
    out.mkdir()
    for group in job.parts():
        job.run(group, merged)
    job.finish(merged)
    routes = RouteJob(Artifact("", merged), calibration, SeApplication(kind="se"), 0.5, "float32", "cpu")
    return out, routes.finish(out)


@pytest.fixture(scope="module")
def classifier(berts, tmp_path_factory):
    """A dynamic classifier of the experts mood (2 classes) and topic (3 classes)."""
    task, calibration = ClassificationTask(kind="classification"), {}
    for name, classes in (("mood", 2), ("topic", 3)):
        rows = [{"text": f"{name} {'?!' * i}", "label": i % classes} for i in range(6)]
        calibration[name] = row_set(task, rows, {f"LABEL_{i}": i for i in range(classes)})
    return make_dynamic(berts, calibration, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def writer(llamas, tmp_path_factory):
    """A dynamic language model of the experts math and code."""
    task = CompletionTask(kind="completion")
    calibration = {
        name: row_set(task, [{"prompt": f"{i}{sign}{i}=", "completion": str(i)} for i in range(3)])
        for name, sign in (("math", "+"), ("code", "-"))
    }
    return make_dynamic(llamas, calibration, tmp_path_factory.mktemp("writer"))


def make_dynamic_report(classifier, writer):
    """A report of a static variant and two dynamic ones, of which one was evaluated."""
    roles = {"base": "base", "mood": "expert", "ta": "variant", "se.3": "variant", "se-lm": "variant"}
    models, variants, routes = dict.fromkeys(roles, str(writer[0] / "base")), {}, {}
    for name, (folder, chosen) in (("se.3", classifier), ("se-lm", writer)):
        models[name] = str(folder)
        weights = read_json(folder / "coefficients.json")["weights"]
        params = {"method": "task_arithmetic", "application.kind": "se"}
        variants[name] = VariantInfo(method="task_arithmetic", params=params, weights=weights, digest=chosen["digest"])
        found = read_json(folder / "route.json")
        routes[name] = RouteInfo(
            rule=chosen["rule"],
            trust=chosen["trust"],
            calibration=found["identification"],
            candidates=found["candidates"],
            projection=found["projection"],
            bytes=chosen["bytes"],
            source_bytes=3 * chosen["bytes"],
        )
    evaluated = {
        "evaluation": score(0.9, 20),
        "confusion": {"mood": {"mood": 9, "topic": 1}, "topic": {"mood": 1, "topic": 9}},
        "right_coefficient": score(0.8, 20),
        "routed": score(0.7, 20),
        "passes": 1.5,
        "milliseconds": 2.5,
        "peak_memory": 10**9,
    }
    routes["se.3"] = routes["se.3"].model_copy(update=evaluated)
    variants["ta"] = VariantInfo(
        method="task_arithmetic", params={"method": "task_arithmetic"}, weights={"head": {"mood": 0.5}}, digest="1" * 64
    )
    return Report(
        recipe="dynamic",
        stages=[],
        models=models,
        uris={name: Path(folder).resolve().as_uri() for name, folder in models.items()},
        roles=roles,
        digests={"base": "b" * 64, "mood": "c" * 64},
        tasks={"math": "accuracy"},
        scores={"base": {"math": {"accuracy": score(0.5)}}},
        mean_normalised={},
        variants=variants,
        routes=routes,
    )


@pytest.fixture(scope="module")
def dynamic_report(classifier, writer):
    return make_dynamic_report(classifier, writer)


@pytest.fixture(scope="module")
def dynamic_runs(dynamic_report, client, store, uri):
    with captured() as text:
        parent = record(dynamic_report, store, uri)
    assert text.getvalue() == ""
    return children(client, parent)


def test_models_with_routes_have_metrics_of_routes(dynamic_runs, dynamic_report):
    scores = ("identification", "held_out", "right_coefficient", "routed_normalised")
    costs = ("passes", "milliseconds", "peak_memory", "bytes", "source_bytes")
    keys = {f"{kind}route/{name}" for name in scores for kind in ("", "low/", "high/", "n/")}
    keys |= {f"route/{name}" for name in costs}
    common = {f"{kind}/math/accuracy" for kind in ("eval", "low", "high", "n")}
    of_routes = {name: set(run.data.metrics) - common for name, run in dynamic_runs.items()}
    assert all(common <= set(run.data.metrics) for run in dynamic_runs.values())
    not_measured = {key for key in keys if not key.endswith(("route/held_out", "/bytes", "/source_bytes"))}
    assert of_routes == {"base": set(), "mood": set(), "ta": set(), "se.3": keys, "se-lm": keys - not_measured}

    logged = dynamic_runs["se.3"].data.metrics
    info = dynamic_report.routes["se.3"]
    taken = dict(zip(scores, (info.evaluation, info.calibration, info.right_coefficient, info.routed), strict=True))
    for name, one in taken.items():
        found = [logged[f"{kind}route/{name}"] for kind in ("", "low/", "high/", "n/")]
        assert found == [one.value, one.low, one.high, one.n]
    assert [logged[f"route/{name}"] for name in costs] == [1.5, 2.5, 10**9, info.bytes, 3 * info.bytes]

    logged = dynamic_runs["se-lm"].data.metrics
    assert logged["route/held_out"] == dynamic_report.routes["se-lm"].calibration.value
    assert logged["route/bytes"] == dynamic_report.routes["se-lm"].bytes


def test_params_tell_the_route(dynamic_runs, dynamic_report):
    for name, info in dynamic_report.routes.items():
        params = dynamic_runs[name].data.params
        assert {key: params[f"route.{key}"] for key in info.rule} == {k: str(v) for k, v in info.rule.items()}
        assert float(params["route.trust"]) == pytest.approx(info.trust, rel=1e-5)
    assert not any(key.startswith("route.") for key in dynamic_runs["ta"].data.params)


def test_a_route_has_seen_the_calibration_sets(dynamic_runs):
    contexts = {
        name: sorted(tag.value for entry in run.inputs.dataset_inputs for tag in entry.tags)
        for name, run in dynamic_runs.items()
    }
    evaluation = ["evaluation", "evaluation"]
    assert contexts == dict.fromkeys(("base", "mood", "ta"), evaluation) | {
        name: ["calibration", "calibration", *evaluation] for name in ("se.3", "se-lm")
    }


def test_a_route_has_pictures_and_the_rules_it_was_chosen_from(dynamic_runs, dynamic_report, client):
    paths = {name: {a.path for a in client.list_artifacts(run.info.run_id)} for name, run in dynamic_runs.items()}
    always = {"coefficients.png", "representations.png", "candidates.json"}
    assert paths == {
        "base": set(),
        "mood": set(),
        "ta": {"coefficients.png", "outcomes.json"},
        "se-lm": always,
        "se.3": always | {"confusion.png"},
    }
    uri = dynamic_runs["se.3"].info.artifact_uri
    for picture in ("representations.png", "confusion.png"):
        assert mlflow.artifacts.load_image(f"{uri}/{picture}").width > 500
    table = json.loads(mlflow.artifacts.load_text(f"{uri}/candidates.json"))
    assert table["columns"] == ["score", "layer", "pool", "metric", "accuracy", "passes"]
    candidates = dynamic_report.routes["se.3"].candidates
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == [
        {key: pytest.approx(value) if isinstance(value, float) else value for key, value in candidate.items()}
        for candidate in candidates
    ]
    assert len(candidates) == 5 * 2 * 3  # scores, layers, pools


TEXTS = [f"{'mood' if i % 3 else 'topic'} {'?!' * (i % 7)} {i}" for i in range(40)]


def load(uri, monkeypatch, model_uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return mlflow.pyfunc.load_model(model_uri)


@pytest.fixture
def scorer(dynamic_runs, client, uri, monkeypatch):
    """The pyfunc of the classifier, loaded by the version of the registered model."""
    (version,) = client.search_model_versions("name = 'dynamic' AND tags.variant = 'se.3'")
    return load(uri, monkeypatch, f"models:/dynamic/{version.version}")


def assert_answers(table, answers):
    experts = list(answers[0].coefficients)
    assert list(table.columns) == ["prediction", "expert", *(f"coefficient.{name}" for name in experts)]
    assert list(table["prediction"]) == [answer.prediction for answer in answers]
    assert list(table["expert"]) == [answer.expert for answer in answers]
    for name in experts:
        found = list(table[f"coefficient.{name}"])
        assert found == pytest.approx([answer.coefficients[name] for answer in answers], abs=1e-5)


def test_the_registered_version_of_a_dynamic_model_answers_texts(scorer, classifier):
    model = DynamicModel.load(classifier[0])
    answers = [answer for text in TEXTS for answer in model.predict([text])]  # one by one
    assert {answer.expert for answer in answers} == {"mood", "topic"}
    table = scorer.predict(pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}))
    assert_answers(table, answers)
    pd.testing.assert_frame_equal(scorer.predict(TEXTS), table)
    pd.testing.assert_frame_equal(scorer.predict(pd.DataFrame({"text": TEXTS}, index=range(100, 140))), table)


def test_the_load_of_the_machine_is_system_metrics_of_the_execution(client, store, uri):
    load = [Load(time, {"cpu_utilization_percentage": 10.0 * time, "disk_usage": 1.0}) for time in range(1, 602)]
    parent = record(make_report(store, "busy"), store, uri, load)
    history = client.get_metric_history(parent, "system/cpu_utilization_percentage")
    assert [(one.timestamp, one.step, one.value) for one in history] == [(i + 1, i, 10.0 * (i + 1)) for i in range(601)]
    assert not any("system/" in key for run in children(client, parent).values() for key in run.data.metrics)


def test_a_dynamic_model_at_a_url_answers_from_anywhere(dynamic_report, classifier, client, store, uri, monkeypatch):
    fsspec.filesystem("memory").put(f"{classifier[0]}/", "/models/", recursive=True)
    uris = dynamic_report.uris | {"se.3": "memory://models"}
    report = dynamic_report.model_copy(update={"recipe": "at-url", "uris": uris})
    (output,) = children(client, record(report, store, uri))["se.3"].outputs.model_outputs
    (version,) = client.search_model_versions("name = 'at-url' AND tags.variant = 'se.3'")
    assert version.tags["folder"] == "memory://models"
    answers = load(uri, monkeypatch, f"models:/{output.model_id}").predict(TEXTS[:3])
    assert_answers(
        answers, [answer for text in TEXTS[:3] for answer in DynamicModel.load(classifier[0]).predict([text])]
    )


def test_a_dynamic_language_model_answers_with_as_many_tokens_as_asked(dynamic_runs, writer, client, uri, monkeypatch):
    (output,) = dynamic_runs["se-lm"].outputs.model_outputs
    loaded = load(uri, monkeypatch, f"models:/{output.model_id}")
    model, prompts = DynamicModel.load(writer[0]), ["1+1=", "7-7="]
    assert_answers(loaded.predict(prompts, params={"max_new_tokens": 3}), model.predict(prompts, 3))
    assert_answers(loaded.predict(prompts), model.predict(prompts))
    assert loaded.metadata.run_id == dynamic_runs["se-lm"].info.run_id
    assert_answers(loaded.predict(loaded.input_example), model.predict(loaded.input_example))


def test_no_texts_are_no_rows(scorer):
    columns = {
        "prediction": "object",
        "expert": "object",
        "coefficient.mood": "float64",
        "coefficient.topic": "float64",
    }
    for nothing in (pd.DataFrame({"text": []}), []):
        table = scorer.predict(nothing)
        assert len(table) == 0
        assert {name: str(dtype) for name, dtype in table.dtypes.items()} == columns


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pd.DataFrame({"sentence": ["a"], "id": [1]}), "found the columns sentence, id; expected a column text"),
        (pd.DataFrame(), r"found the columns \(none\); expected a column text"),
        (pd.DataFrame({"text": ["a", None]}), r"row 1: found (None|nan), expected a text"),
        ([3], "row 0: found 3, expected a text"),
        ("a text", "found a single text; expected a DataFrame with a column text, or a list"),
        (["short"] * 35 + ["long" * 99], "rows counted from 32: text 3 has 396 tokens; the model takes 1 to 128"),
    ],
)
def test_what_is_no_table_of_texts_is_refused(given, message, scorer):
    with pytest.raises(MlflowException, match=message):
        scorer.predict(given)


def test_nothing_of_the_weights_is_in_mlflow(dynamic_runs, client, store):
    for name in ("ta", "se.3", "se-lm"):
        (output,) = dynamic_runs[name].outputs.model_outputs
        model = client.get_logged_model(output.model_id)
        assert model.status == "READY"
        assert "mlflow.model.isExternal" not in model.tags
        folder = Path(url2pathname(urlparse(model.artifact_location).path))
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        assert {"MLmodel", "code/sensmerge/tasks/serving/scorer.py", "requirements.txt"} <= set(files)
        assert not [path for path in files if path.endswith(".safetensors")]


def test_what_a_dynamic_model_needs_is_pinned(dynamic_runs, client):
    (output,) = dynamic_runs["se.3"].outputs.model_outputs
    location = client.get_logged_model(output.model_id).artifact_location
    lines = mlflow.artifacts.load_text(f"{location}/requirements.txt").split()
    assert all(re.fullmatch(r"[a-z_]+==[0-9.a-z]+", line) for line in lines)
    assert {"torch", "transformers", "mlflow", "pandas", "safetensors", "pydantic"} <= {
        line.partition("==")[0] for line in lines
    }


def test_a_dynamic_model_whose_folder_is_altered_does_not_load(classifier, client, store, uri, tmp_path, monkeypatch):
    folder = shutil.copytree(classifier[0], tmp_path / "copy")
    report = make_dynamic_report((folder, classifier[1]), classifier)
    report.recipe = "altered"
    runs = children(client, record(report, store, uri))
    (output,) = runs["se.3"].outputs.model_outputs
    (folder / "heads" / "mood" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"copy/heads/mood/config\.json: was altered"):
        load(uri, monkeypatch, f"models:/{output.model_id}")


def test_a_dynamic_model_is_registered_once(dynamic_report, client, store, uri):
    report = dynamic_report.model_copy(update={"recipe": "again"})
    first, second = (children(client, record(report, store, uri)) for _ in range(2))
    versions = {v.tags["variant"]: v for v in client.search_model_versions("name = 'again'")}
    assert set(versions) == {"ta", "se.3", "se-lm"}
    assert len(client.search_model_versions("name = 'again'")) == 3
    for name in ("se.3", "se-lm"):
        assert versions[name].run_id == first[name].info.run_id
        (mine,), (later,) = (runs[name].outputs.model_outputs for runs in (first, second))
        assert versions[name].source == client.get_logged_model(mine.model_id).artifact_location
        (link,) = json.loads(client.get_logged_model(later.model_id).tags["mlflow.modelVersions"])
        assert link["version"] == str(versions[name].version)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URI of a real tracking server with a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "kept")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # starts faster
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not _healthy(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_a_real_server_takes_everything_too(server, tmp_path):
    check_server(server)
    report = make_report(tmp_path)
    with captured() as text:
        parent = tracking.record(tracking.Execution(report, OUTCOMES, RECIPE, PLAN, make_datasets()), server, tmp_path)
        again = tracking.record(
            tracking.Execution(report, OUTCOMES, RECIPE, PLAN, make_datasets()), f"{server}/", tmp_path
        )
    assert text.getvalue() == ""
    client = MlflowClient(server, server)
    experiment = client.get_experiment_by_name("two-skills").experiment_id
    for uri, run in ((server, parent), (f"{server}/", again)):
        assert (
            where_recorded(uri, run)
            == f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=models"
        )
    runs = children(client, parent)
    assert {name: run.data.tags["role"] for name, run in runs.items()} == MODELS
    assert len({frozenset(run.data.metrics) for run in runs.values()}) == 1
    assert runs["ta"].data.metrics["eval/math/accuracy"] == report.scores["ta"]["math"]["accuracy"].value
    assert math.isnan(runs["math"].data.metrics["eval/code/accuracy"])
    assert len(runs["ta-sens.3"].inputs.dataset_inputs) == 4
    assert_models(client, runs, tmp_path, lambda model: f"models:/{model.model_id}")
    assert len(client.list_artifacts(parent)) == 6
    kept = {artifact.path for artifact in client.list_artifacts(runs["ta"].info.run_id)}
    assert kept == {"coefficients.png", "outcomes.json"}
    # A server keeps the artifacts itself.
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"config.json"}


def test_a_real_server_serves_dynamic_models(server, dynamic_report, classifier, tmp_path, monkeypatch):
    with captured() as text:
        parent = tracking.record(
            tracking.Execution(dynamic_report, OUTCOMES, RECIPE, PLAN, make_datasets()), server, tmp_path
        )
    assert text.getvalue() == ""
    client = MlflowClient(server, server)
    assert set(children(client, parent)) == set(dynamic_report.models)
    (version,) = client.search_model_versions("name = 'dynamic' AND tags.variant = 'se.3'")
    loaded = load(server, monkeypatch, f"models:/dynamic/{version.version}")
    assert_answers(loaded.predict(TEXTS[:3]), DynamicModel.load(classifier[0]).predict(TEXTS[:3]))
    (version,) = client.search_model_versions("name = 'dynamic' AND tags.variant = 'ta'")
    pipeline = mlflow.transformers.load_model(f"models:/dynamic/{version.version}")
    merged = load_file(Path(dynamic_report.models["ta"]) / "model.safetensors")
    assert torch.equal(pipeline.model.state_dict()["model.norm.weight"], merged["model.norm.weight"])
    assert not list(tmp_path.iterdir())
