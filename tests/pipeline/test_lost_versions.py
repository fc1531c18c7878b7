"""Versions whose weights are no more in the store: said in MLflow, refused by name, and never those that must stay."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sensmerge.pipeline.store.history import remember
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.pipeline.tracking import record as tracking
from sensmerge.pipeline.tracking.uri import default_uri
from tests.conftest import command_line, llama_config
from tests.pipeline.store.test_remote import BUCKET
from tests.pipeline.tracking.test_record import OUTCOMES, make_datasets, make_report

Publish = Callable[[int], str]


def key(number: int) -> Key:
    return Key("merge", "ta", {"stage": "merge", "settings": {"weight": number}, "reads": {}})


def publish(store: Store, number: int, uri: str) -> str:
    """Make the merge of a recipe of one variant, record it as a run that was the last one, and return its version."""
    one = key(number)
    store.partial(one).mkdir(parents=True)
    llama_config(architectures=["LlamaForCausalLM"]).save_pretrained(store.partial(one))
    (store.partial(one) / "model.safetensors").write_bytes(bytes([number]) * 1000)
    store.publish(one, {"result": {}})
    report = make_report(store.root / "others", "lost")
    report.models["ta"], report.uris["ta"] = str(store.folder(one)), store.uri(store.folder(one))
    report.variants["ta"].digest = f"{number}" * 64
    del report.variants["ta-sens.3"], report.models["ta-sens.3"]
    tracking.record(tracking.Execution(report, OUTCOMES, "", "", make_datasets()), uri, store.root)
    remember(store, "lost", "refresh", [one], uri)
    return str(number)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def client(store: Store) -> MlflowClient:
    return MlflowClient(default_uri(store), default_uri(store))


def logged_model(client: MlflowClient, number: str) -> Any:
    (output,) = client.get_run(client.get_model_version("lost", number).run_id).outputs.model_outputs
    return client.get_logged_model(output.model_id)


def test_gc_marks_what_it_frees_and_keeps_what_is_named(
    store: Store, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = default_uri(store)
    for number in range(1, 7):
        publish(store, number, uri)
    client.set_registered_model_alias("lost", "champion", "1")
    client.set_registered_model_alias("lost", "production", "2")
    client.set_model_version_tag("lost", "3", "pinned", "true")
    client.set_model_version_tag("lost", "4", "pinned", "false")
    assert command_line("gc", "--store", store.root, "--keep", "1") == 0
    assert "weights" not in client.get_model_version("lost", "4").tags  # only listed
    capsys.readouterr()
    assert command_line("gc", "--store", store.root, "--keep", "1", "--delete") == 0
    said = capsys.readouterr().out
    for line in ("champion of lost", "production of lost", "pinned version 3 of lost"):
        assert f"kept: {line}" in said
    found = {number: client.get_model_version("lost", str(number)) for number in range(1, 7)}
    assert {number for number in found if store.manifest(key(number)) is None} == {4, 5}
    for number, one in found.items():
        freed = number in (4, 5)
        assert (f"lost/{number}: its weights are deleted" in said) == freed
        assert ("weights" in one.tags) == freed
        assert one.description.startswith("Its weights were freed on ") == freed
        assert logged_model(client, str(number)).status == ("FAILED" if freed else "READY")
    assert re.fullmatch(r"freed \d{4}-\d\d-\d\d", found[4].tags["weights"])
    assert "mlflow.pyfunc.load_model" in found[4].description

    assert command_line("promote", "lost/4", "--store", store.root) == 2
    assert f"lost/4 (ta): {store.folder(key(4))} is not there; run the recipe as it was" in capsys.readouterr().err
    assert client.get_model_version_by_alias("lost", "champion").version == 1

    # A run makes them anew.
    publish(store, 4, uri)
    again = client.get_model_version("lost", "4")
    assert "weights" not in again.tags
    assert again.description.startswith("Static: ")
    assert logged_model(client, "4").status == "READY"
    assert len(client.search_model_versions("name = 'lost'")) == 6
    assert command_line("promote", "lost/4", "--store", store.root) == 0


def test_weights_of_the_same_name_elsewhere_are_not_said_to_be_gone(store: Store, tmp_path: Path) -> None:
    """Two stores record at one MLflow, and one of them is tidied."""
    uri, other = default_uri(store), Store(tmp_path / "other")
    publish(store, 1, uri)
    publish(other, 2, uri)
    store.partial(key(2)).mkdir(parents=True)
    store.publish(key(2), {"result": {}})
    client = MlflowClient(uri, uri)
    assert command_line("gc", "--store", store.root, "--keep", "1", "--delete") == 0
    assert not store.folder(key(2)).exists()
    assert "weights" not in client.get_model_version("lost", "2").tags


def test_a_store_that_is_mounted_elsewhere_is_whole(store: Store, client: MlflowClient, tmp_path: Path) -> None:
    publish(store, 1, default_uri(store))
    moved = store.root.rename(tmp_path / "moved")
    uri = f"sqlite:///{moved}/mlflow.db"
    assert command_line("promote", "lost/1", "--store", moved, "--tracking-uri", uri) == 0
    assert command_line("promote", "lost/1", "--store", tmp_path / "another", "--tracking-uri", uri) == 2


def test_at_a_url(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENSMERGE_CACHE", str(tmp_path / "cache"))
    store, uri = Store.open(BUCKET), f"sqlite:///{tmp_path}/mlflow.db"
    store.make()
    publish(store, 1, uri)
    publish(store, 2, uri)
    client = MlflowClient(uri, uri)
    options = ("--store", BUCKET, "--tracking-uri", uri)
    assert command_line("promote", "lost/2", *options) == 0
    assert command_line("gc", *options, "--keep", "1", "--delete") == 0
    assert "weights" in client.get_model_version("lost", "1").tags
    assert "weights" not in client.get_model_version("lost", "2").tags
    bucket.rm(f"{store.uri(store.folder(key(2)))}/model.safetensors")
    assert store.lacking(store.uri(store.folder(key(2)))) == (
        f"{store.uri(store.folder(key(2)))}/model.safetensors is not there"
    )
    for number in ("1", "2"):
        assert command_line("promote", f"lost/{number}", *options) == 2
