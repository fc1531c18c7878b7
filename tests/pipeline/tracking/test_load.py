"""Registered versions, loaded as those who deploy them do: the model that was scored, or an error that says why not."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sensmerge.pipeline.report.report import Report, RouteInfo, VariantInfo
from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking import record as tracking
from sensmerge.pipeline.tracking.load import Merged, write_beside
from sensmerge.pipeline.tracking.requirements import requirements
from sensmerge.pipeline.tracking.uri import default_uri
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.serving.static_model import StaticModel
from tests.pipeline.store import test_remote
from tests.pipeline.tracking import test_record
from tests.pipeline.tracking.test_record import captured
from tests.tasks.serving import test_static_model
from tests.tasks.serving.test_static_model import TEXTS

# The same models serve here.
static_writer, trunk, classifier = test_static_model.writer, test_static_model.trunk, test_static_model.classifier
dynamic_writer = test_record.writer

Load = Callable[[str], Any]
IDS = torch.tensor([[20, 21, 22, 23]])
PROMPTS = {
    "math": {"kind": "completion", "prompt": "{a}+{a}=", "max_length": 512},
    "code": {"kind": "completion", "prompt": "say: {said}", "max_length": 512},
}


@dataclass(frozen=True)
class Recorded:
    """A registry that has a version of every model."""

    client: MlflowClient
    folders: dict[str, Path]
    recipe: str

    def version(self, variant: str) -> Any:
        (found,) = self.client.search_model_versions(f"name = '{self.recipe}' AND tags.variant = '{variant}'")
        return found

    def model_id(self, variant: str) -> str:
        """The LoggedModel of the run that made the version."""
        (output,) = self.client.get_run(self.version(variant).run_id).outputs.model_outputs
        return str(output.model_id)

    def uri(self, variant: str) -> str:
        """The version by the alias that those who deploy it name."""
        alias = variant.replace("_", "-")
        self.client.set_registered_model_alias(self.recipe, alias, self.version(variant).version)
        return f"models:/{self.recipe}@{alias}"


def make_report(recipe: str, folders: dict[str, Path], chosen: dict[str, Any], uris: dict[str, str]) -> Report:
    found = read_json(folders["dynamic"] / "route.json")
    route = RouteInfo(
        rule=chosen["rule"],
        trust=chosen["trust"],
        calibration=found["identification"],
        candidates=found["candidates"],
        projection=found["projection"],
        bytes=chosen["bytes"],
        source_bytes=chosen["bytes"],
    )
    variants = {
        name: VariantInfo(
            method="linear",
            params={},
            weights=read_json(folder / "coefficients.json")["weights"],
            digest=f"{number}" * 64,
        )
        for number, (name, folder) in enumerate(folders.items())
    }
    return Report(
        recipe=recipe,
        stages=[],
        models={name: str(folder) for name, folder in folders.items()},
        uris=uris,
        roles=dict.fromkeys(folders, "variant"),
        digests={},
        tasks={},
        scores={},
        mean_normalised={},
        variants=variants,
        routes={"dynamic": route},
        prompts=PROMPTS,
    )


@pytest.fixture(scope="module")
def folders(static_writer: Path, trunk: Path, classifier: Path, dynamic_writer: Any) -> dict[str, Path]:
    return {"static": static_writer, "trunk": trunk, "classifier": classifier, "dynamic": dynamic_writer[0]}


@pytest.fixture(scope="module")
def recorded(folders: dict[str, Path], dynamic_writer: Any, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The versions of models in folders."""
    store = tmp_path_factory.mktemp("store")
    uri = default_uri(Store(store))
    uris = {name: folder.resolve().as_uri() for name, folder in folders.items()}
    with captured() as text:
        tracking.record(
            tracking.Execution(make_report("kinds", folders, dynamic_writer[1], uris), {}, "", "", []), uri, store
        )
    assert text.getvalue() == ""
    return Recorded(MlflowClient(uri, uri), folders, "kinds")


@pytest.fixture
def connected(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorded.client.tracking_uri)
    return recorded


def logits(network: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network.eval()(IDS).logits
    return found


def assert_loads_the_static_merge(uri: str, folder: Path) -> None:
    """mlflow.transformers and pyfunc give the logits and the continuations of the checkpoint."""
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pipeline = mlflow.transformers.load_model(uri)
    assert pipeline.task == "text-generation"
    assert torch.equal(logits(pipeline.model), logits(plain))
    assert pipeline.tokenizer(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    pyfunc = mlflow.pyfunc.load_model(uri)
    assert torch.equal(logits(pyfunc.get_raw_model().network()), logits(plain))
    table = pyfunc.predict(pd.DataFrame({"text": TEXTS}), params={"max_new_tokens": 4})
    assert list(table.columns) == ["prediction"]
    for text, found in zip(TEXTS, table["prediction"], strict=True):
        (made,) = pipeline(text, max_new_tokens=4, do_sample=False, return_full_text=False)
        assert made["generated_text"] == found
    pd.testing.assert_frame_equal(pyfunc.predict(TEXTS, params={"max_new_tokens": 4}), table)


def assert_loads_the_dynamic_model_or_nothing(uri: str, folder: Path) -> None:
    """pyfunc answers as the dynamic model does; whatever loads checkpoints fails by name."""
    model, pyfunc = DynamicModel.load(folder), mlflow.pyfunc.load_model(uri)
    table = pyfunc.predict(TEXTS, params={"max_new_tokens": 4})
    assert list(table["prediction"]) == [one.prediction for one in model.predict(TEXTS, 4)]
    samples = [{"input_ids": model.tokenizer(text)["input_ids"]} for text in TEXTS]
    loaded = pyfunc.get_raw_model()
    for found, expected in zip(
        loaded.logits(samples, loaded.route(samples)), model.logits(samples, model.route(samples)), strict=True
    ):
        assert torch.equal(found, expected)
    with pytest.raises(MlflowException, match='does not have the "transformers" flavor'):
        mlflow.transformers.load_model(uri)


def test_a_static_language_model(connected: Recorded) -> None:
    assert_loads_the_static_merge(connected.uri("static"), connected.folders["static"])


def test_a_version_knows_the_prompts_of_its_recipe(connected: Recorded) -> None:
    asked = pd.DataFrame({"task": ["math", "code"], "a": [1, 3], "said": ["x", "y"]})
    texts = ["1+1=", "say: y"]
    how = {"max_new_tokens": 6, "temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["e", "\n"]}
    pyfunc = mlflow.pyfunc.load_model(connected.uri("static"))
    pd.testing.assert_frame_equal(pyfunc.predict(asked, params=how), pyfunc.predict(texts, params=how))
    rows = asked[:1].drop(columns="task")
    pd.testing.assert_frame_equal(pyfunc.predict(rows, params={"task": "math"}), pyfunc.predict(texts[:1]))
    dynamic = mlflow.pyfunc.load_model(connected.uri("dynamic"))
    rows = pd.DataFrame({"prompt": texts, "task": ["math", "code"]})
    pd.testing.assert_frame_equal(dynamic.predict(rows, params=how), dynamic.predict(texts, params=how))


def test_a_dynamic_language_model(connected: Recorded) -> None:
    assert_loads_the_dynamic_model_or_nothing(connected.uri("dynamic"), connected.folders["dynamic"])
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(connected.folders["dynamic"])


def test_a_trunk_answers_with_the_head_of_the_task_that_is_named(connected: Recorded) -> None:
    uri, model = connected.uri("trunk"), StaticModel.load(connected.folders["trunk"])
    pyfunc = mlflow.pyfunc.load_model(uri)
    for task in ("mood", "topic"):
        found = pyfunc.predict(TEXTS, params={"task": task})
        assert list(found["prediction"]) == model.predict(TEXTS, task=task)
    with pytest.raises(MlflowException, match="task is None; expected the parameter task, one of mood, topic"):
        pyfunc.predict(TEXTS)
    with pytest.raises(MlflowException, match='does not have the "transformers" flavor'):
        mlflow.transformers.load_model(uri)


def test_a_classifier_that_is_merged_with_its_head(connected: Recorded) -> None:
    uri, model = connected.uri("classifier"), StaticModel.load(connected.folders["classifier"])
    pipeline, pyfunc = mlflow.transformers.load_model(uri), mlflow.pyfunc.load_model(uri)
    expected = model.predict(TEXTS)
    assert [one["label"] for one in pipeline(TEXTS)] == list(pyfunc.predict(TEXTS)["prediction"]) == expected
    assert torch.equal(logits(pipeline.model), logits(model.network()))


@pytest.mark.parametrize("variant", ["static", "dynamic"])
def test_models_at_a_url(
    variant: str, bucket: Any, connected: Recorded, dynamic_writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = {name: f"{test_remote.BUCKET}/merge/{name}" for name in connected.folders}
    report = make_report(f"url-{variant}", connected.folders, dynamic_writer[1], uris)
    # As `run` does it for a store at a URL.
    folder = tmp_path / "mirror"
    bucket.put(f"{connected.folders[variant]}/", f"{uris[variant]}/", recursive=True)
    bucket.get(f"{uris[variant]}/", f"{folder}/", recursive=True)
    report.models[variant] = str(folder)
    names = write_beside(Merged.of(report, variant))
    bucket.put([str(folder / name) for name in names], [f"{uris[variant]}/{name}" for name in names])
    with captured():
        tracking.record(tracking.Execution(report, {}, "", "", []), connected.client.tracking_uri, tmp_path)
    at_url = Recorded(connected.client, connected.folders, report.recipe)
    assert at_url.version(variant).source == uris[variant]
    check = assert_loads_the_static_merge if variant == "static" else assert_loads_the_dynamic_model_or_nothing
    check(at_url.uri(variant), connected.folders[variant])
    # The LoggedModel of the run is a pyfunc that fetches the model itself.
    pyfunc = mlflow.pyfunc.load_model(f"models:/{at_url.model_id(variant)}")
    assert len(pyfunc.predict(TEXTS, params={"max_new_tokens": 2})) == len(TEXTS)
    bucket.rm(uris[variant], recursive=True)
    with pytest.raises(InputError, match=f"{uris[variant]}: the merged model is not there; mount the store"):
        mlflow.pyfunc.load_model(f"models:/{at_url.model_id(variant)}")


def test_without_a_package_for_the_url_mlflow_reads_nothing(folders: dict[str, Path], monkeypatch: Any) -> None:
    merged = Merged(
        "r", "v", "static", folders["static"], "s3://bucket/merge/v", "language_model", True, "texts", "float32", (), {}
    )
    assert merged.is_read_by_mlflow
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    for uri in ("gs://bucket/merge/v", "memory://bucket/merge/v"):
        other = dataclasses.replace(merged, uri=uri)
        assert not other.is_read_by_mlflow
        assert other.loaders == ["mlflow.pyfunc", "transformers"]


def test_a_model_whose_folder_is_gone(connected: Recorded, dynamic_writer: Any, tmp_path: Path) -> None:
    uris = {name: (tmp_path / "gone").as_uri() for name in connected.folders}
    with captured():
        report = make_report("gone", connected.folders, dynamic_writer[1], uris)
        tracking.record(tracking.Execution(report, {}, "", "", []), connected.client.tracking_uri, tmp_path)
    gone = Recorded(connected.client, connected.folders, "gone")
    for variant in ("static", "dynamic"):
        with pytest.raises(InputError, match="gone: the merged model is not there"):
            mlflow.pyfunc.load_model(gone.uri(variant))
    with pytest.raises(OSError, match="gone"):
        mlflow.transformers.load_model(gone.uri("static"))


def test_versions_say_what_they_are_and_how_they_are_loaded(connected: Recorded) -> None:
    for variant, kind in (("static", "static"), ("trunk", "static"), ("classifier", "static"), ("dynamic", "dynamic")):
        found = connected.version(variant)
        assert found.tags["kind"] == kind
        whole = variant in ("static", "classifier")
        assert found.tags["loaders"].startswith("mlflow.transformers, mlflow.pyfunc" if whole else "mlflow.pyfunc")
        name = f'"models:/kinds/{found.version}"'
        assert f"mlflow.pyfunc.load_model({name})" in found.description
        assert (f"mlflow.transformers.load_model({name})" in found.description) == whole
        assert f"{kind.capitalize()}: " in found.description
    assert 'params={"task": "mood"}' in connected.version("trunk").description


def files_of(recorded: Recorded, variant: str) -> Path:
    model = recorded.client.get_logged_model(recorded.model_id(variant))
    return Path(urlparse(model.artifact_location).path)


@pytest.mark.parametrize("variant", ["static", "dynamic"])
def test_a_server_needs_what_the_model_lists_and_nothing_of_this_project(
    variant: str, connected: Recorded, tmp_path: Path
) -> None:
    """Another process, in which every package that the model does not ask for, directly or not, cannot be imported."""
    folder = files_of(connected, variant)
    lines = (folder / "requirements.txt").read_text().split()
    listed = {name: pin for name, _, pin in (line.partition("==") for line in lines)}
    assert {"torch", "transformers", "safetensors", "mlflow"} <= set(listed)
    assert {"ray", "typer", "lm_eval", "sensmerge", "peft"} & set(listed) <= {"peft"}
    assert all(version(name).partition("+")[0] == pin for name, pin in listed.items())
    environment = (folder / "python_env.yaml").read_text(), (folder / "conda.yaml").read_text()
    assert "requirements.txt" in environment[0]
    assert all(line in environment[1] for line in lines)
    script = f"""
import sys
sys.modules |= dict.fromkeys(("ray", "typer", "lm_eval", "pipeline"))
import mlflow
model = mlflow.pyfunc.load_model({str(folder)!r})
print(sys.modules["sensmerge.tasks.serving.scorer"].__file__)
print(len(model.predict(["1+2="], params={{"max_new_tokens": 2}})))
"""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [str(folder / "code" / "sensmerge" / "tasks" / "serving" / "scorer.py"), "1"]


def test_requirements_follow_the_imports(tmp_path: Path) -> None:
    found = {line.partition("==")[0] for line in requirements("sensmerge.tasks.errors")}
    assert found == set()
    serving = {line.partition("==")[0] for line in requirements("sensmerge.tasks.serving.scorer")}
    assert {"pandas", "fsspec", "torch", "pydantic"} <= serving
    assert "s3fs" not in serving
    assert "s3fs" in {line.partition("==")[0] for line in requirements("sensmerge.tasks.serving.scorer", "s3fs")}
