"""The files of infra/: valid by the schemas that packages ship, of one mind with each other and with the project."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from sensmerge.pipeline.cli import app

PROJECT = Path(__file__).resolve().parents[2]
INFRA = PROJECT / "infra"
KUBERNETES = INFRA / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")
VERSION = "1.33"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    (found,) = re.findall(rf"^{package}==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    return str(found)


def cluster_specs() -> dict[str, dict[str, Any]]:
    """What each manifest says of a Ray cluster."""
    return {
        "cluster": load(KUBERNETES / "cluster.yaml")["spec"],
        "rayjob": load(KUBERNETES / "rayjob.yaml")["spec"]["rayClusterSpec"],
        "raycronjob": load(KUBERNETES / "raycronjob.yaml")["spec"]["jobTemplate"]["rayClusterSpec"],
    }


def refreshes() -> dict[str, list[str]]:
    """The command that each manifest runs on a cluster."""
    (script,) = pod_of_cronjob()["spec"]["containers"][0]["args"]
    submitted = script.split("-- \\\n")[1].split(" &\n")[0].replace("\\\n", " ")
    return {
        "cronjob": shlex.split(submitted),
        "rayjob": shlex.split(load(KUBERNETES / "rayjob.yaml")["spec"]["entrypoint"]),
        "raycronjob": shlex.split(load(KUBERNETES / "raycronjob.yaml")["spec"]["jobTemplate"]["entrypoint"]),
    }


def pod_of_cronjob() -> dict[str, Any]:
    template: dict[str, Any] = load(KUBERNETES / "cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]
    return template


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_schemas(path: Path) -> None:
    manifest = load(path)
    if manifest["apiVersion"] == "ray.io/v1":
        # No package has the schemas of KubeRay; most of these manifests are pods, though.
        spec = cluster_specs()[path.stem]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | group["template"]
            kubernetes_validate.validate(pod, VERSION, strict=True)
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_schemas_find_a_misspelt_key() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | pod_of_cronjob()
    pod["spec"]["restartPolice"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolice"):
        kubernetes_validate.validate(pod, VERSION, strict=True)


def pods() -> list[dict[str, Any]]:
    """The pods of all manifests."""
    groups = [
        group for spec in cluster_specs().values() for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    return [one["spec"] for one in (*(group["template"] for group in groups), pod_of_cronjob())]


def test_pods_keep_the_restricted_policy() -> None:
    """What Kubernetes' Pod Security Standards ask of namespaces that are labelled `restricted`."""
    assert len(pods()) == 7
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        volumes = ("configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
        assert all(one.keys() - {"name"} <= set(volumes) for one in pod.get("volumes", ()))
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            allowed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == allowed
            assert not any("hostPort" in port for port in container.get("ports", ()))


def test_kustomization_names_files_that_are_there() -> None:
    kustomization = load(KUBERNETES / "kustomization.yaml")
    assert all((KUBERNETES / name).is_file() for name in kustomization["resources"])
    (image,) = kustomization["images"]
    for spec in cluster_specs().values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["template"]["spec"]["containers"][0]["image"] == f"{image['name']}:{image['newTag']}"
    assert pod_of_cronjob()["spec"]["containers"][0]["image"] == f"{image['name']}:{image['newTag']}"


def test_nightly_job_does_not_overlap_and_ends() -> None:
    spec = load(KUBERNETES / "cronjob.yaml")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["successfulJobsHistoryLimit"] > 0
    assert spec["failedJobsHistoryLimit"] > 0
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 0
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0


def test_kuberay_manifests_agree() -> None:
    specs = cluster_specs()
    assert specs["cluster"] == specs["rayjob"] == specs["raycronjob"]
    cron = load(KUBERNETES / "raycronjob.yaml")["spec"]
    assert cron["jobTemplate"] == load(KUBERNETES / "rayjob.yaml")["spec"]
    assert cron["schedule"] == load(KUBERNETES / "cronjob.yaml")["spec"]["schedule"]
    assert specs["cluster"]["rayVersion"] == pinned("ray")


def test_the_token_is_asked_for_everywhere() -> None:
    assert all(spec["authOptions"] == {"mode": "token"} for spec in cluster_specs().values())
    environment = {one["name"]: one for one in pod_of_cronjob()["spec"]["containers"][0]["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    # KubeRay keeps the token in a secret that is called as the cluster.
    secret = {"name": load(KUBERNETES / "cluster.yaml")["metadata"]["name"], "key": "auth_token"}
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == secret
    assert environment["RAY_ADDRESS"]["value"] == f"http://{secret['name']}-head-svc:8265"
    assert "RAY_AUTH_MODE=token" in (INFRA / "Dockerfile").read_text()
    assert load(INFRA / "cluster.yaml")["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("name", ["cronjob", "rayjob", "raycronjob"])
def test_commands_are_the_command_lines(name: str) -> None:
    script, command, *arguments = refreshes()[name]
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[script] == "sensmerge.pipeline.cli:main"
    group = typer.main.get_command(app)
    context = click.Context(group)
    refresh = group.get_command(context, command)  # type: ignore[attr-defined]
    parsed = refresh.make_context(command, arguments, parent=context).params
    mounts = cluster_specs()["cluster"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    for path in (parsed["recipe"], parsed["store"].root):
        assert path.is_relative_to(mounts[0]["mountPath"])
    assert parsed["refused_exit_status"] == 0  # a refused challenger is an outcome, and no job that failed
    assert parsed == refresh.make_context(command, refreshes()["rayjob"][2:], parent=context).params


def test_cluster_launcher_takes_the_cluster() -> None:
    config = prepare_config(load(INFRA / "cluster.yaml"))
    config["cluster_synced_files"] = []
    validate_config(config)
    schema = json.loads((Path(validate_config.__code__.co_filename).parents[1] / "ray-schema.json").read_text())
    jsonschema.validate(load(INFRA / "cluster.yaml"), schema)


def test_compose_file() -> None:
    compose = load(INFRA / "mlflow" / "compose.yaml")
    jsonschema.validate(compose, get_builtin_schema("vendor.compose-spec"))
    server = compose["services"]["mlflow"]
    assert server["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql://")
    # Every variable without a default is in the example of settings, and that of the secret is empty.
    example = dict(re.findall(r"^(\w+)=(\S*)", (INFRA / "mlflow" / "env.example").read_text(), re.MULTILINE))
    needed = set(re.findall(r"\$\{(\w+):\?", (INFRA / "mlflow" / "compose.yaml").read_text()))
    assert needed == {"POSTGRES_PASSWORD"}
    assert example["POSTGRES_PASSWORD"] == ""


def test_runtime_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    config = load(INFRA / "runtime_env.yaml")
    assert set(RuntimeEnv(**config, _validate=True)) == set(config)
