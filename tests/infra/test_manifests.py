"""The files of infra/: valid by the schemas that packages ship, of one mind with each other and with the project."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
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
from sensmerge.pipeline.webhook import WEBHOOK

PROJECT = Path(__file__).resolve().parents[2]
INFRA = PROJECT / "infra"
KUBERNETES = INFRA / "kubernetes"
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml")
RENDERED = ("cluster", "nightly", "job")
"""Folders that are applied."""
VERSION = "1.33"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def pinned(package: str) -> str:
    (found,) = re.findall(rf"^{package}==(\S+)$", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    return str(found)


def spec_of_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest of KubeRay says of a Ray cluster."""
    spec: dict[str, Any] = manifest["spec"]
    job: dict[str, Any] = spec.get("jobTemplate", spec)
    found: dict[str, Any] = job.get("rayClusterSpec", job)
    return found


def cluster_specs() -> dict[str, dict[str, Any]]:
    """What each manifest says of a Ray cluster."""
    return {path.stem: spec_of_cluster(load(path)) for path in MANIFESTS if load(path)["kind"].startswith("Ray")}


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The templates of all pods that come of a manifest."""
    spec = manifest["spec"]
    if manifest["kind"] == "CronJob":
        return [spec["jobTemplate"]["spec"]["template"]]
    if not manifest["kind"].startswith("Ray"):
        return []
    cluster, job = spec_of_cluster(manifest), spec.get("jobTemplate", spec)
    groups = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [*groups, *([job["submitterPodTemplate"]] if "submitterPodTemplate" in job else [])]


def refreshes() -> dict[str, list[str]]:
    """The command that each manifest runs on a cluster."""
    (script,) = pod_of_cronjob()["spec"]["containers"][0]["args"]
    submitted = script.split("-- \\\n")[1].split(" &\n")[0].replace("\\\n", " ")
    job, nightly = (load(KUBERNETES / name)["spec"] for name in ("job/rayjob.yaml", "nightly/raycronjob.yaml"))
    return {
        "cronjob": shlex.split(submitted),
        "rayjob": shlex.split(job["entrypoint"]),
        "raycronjob": shlex.split(nightly["jobTemplate"]["entrypoint"]),
    }


def pod_of_cronjob() -> dict[str, Any]:
    template: dict[str, Any] = load(KUBERNETES / "cluster" / "cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]
    return template


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_schemas(path: Path) -> None:
    manifest = load(path)
    if manifest["apiVersion"] == "ray.io/v1":
        # No package has the schemas of KubeRay; most of these manifests are pods, though.
        for template in pods_of(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | template
            kubernetes_validate.validate(pod, VERSION, strict=True)
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_schemas_find_a_misspelt_key() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | pod_of_cronjob()
    pod["spec"]["restartPolice"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError, match="restartPolice"):
        kubernetes_validate.validate(pod, VERSION, strict=True)


def check_restricted(manifest: dict[str, Any]) -> None:
    """What Kubernetes' Pod Security Standards ask of namespaces that are labelled `restricted`."""
    for template in pods_of(manifest):
        pod = template["spec"]
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


def test_pods_keep_the_restricted_policy() -> None:
    assert sum(len(pods_of(load(path))) for path in MANIFESTS) == 9
    for path in MANIFESTS:
        check_restricted(load(path))


def render(folder: Path, *components: str, images: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Render a folder of manifests with components that it leaves out, and other images, as `kubectl apply -k` does."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("needs kubectl")
    for name in components:
        path = folder / "kustomization.yaml"
        text = path.read_text()
        assert f"\n  # - ../{name} " in text
        path.write_text(text.replace(f"\n  # - ../{name} ", f"\n  - ../{name} "))
    path = folder.parent / "images" / "kustomization.yaml"
    for old, new in (images or {}).items():
        path.write_text(path.read_text().replace(old, new))
    done = subprocess.run([program, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def image_of(template: dict[str, Any]) -> str:
    (container,) = template["spec"]["containers"]
    return str(container["image"])


@pytest.mark.parametrize("name", RENDERED)
def test_what_is_rendered_is_what_the_files_say(name: str) -> None:
    rendered = {one["kind"]: one for one in render(KUBERNETES / name)}
    folders = (name,) if name == "job" else (name, "storage")
    assert rendered == {load(path)["kind"]: load(path) for path in MANIFESTS if path.parent.name in folders}


@pytest.mark.parametrize("name", RENDERED)
def test_components_and_images_reach_the_pods(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(KUBERNETES, tmp_path / "kubernetes") / name
    names = {
        "newName: registry.example.com/sensmerge\n    newTag: 0.1.0": "newName: mine/cpu\n    newTag: 0.2.0",
        "newName: registry.example.com/sensmerge-cuda\n    newTag: 0.1.0": "newName: mine/gpu\n    newTag: 0.3.0",
    }
    rendered = render(folder, "gpu", "autoscaling", images=names)
    (ray,) = (one for one in rendered if one["kind"].startswith("Ray"))
    cluster = spec_of_cluster(ray)
    (workers,) = cluster["workerGroupSpecs"]
    assert image_of(cluster["headGroupSpec"]["template"]) == "mine/cpu:0.2.0"
    assert image_of(workers["template"]) == "mine/gpu:0.3.0"
    images = [image_of(template) for one in rendered for template in pods_of(one)]
    assert images.count("mine/gpu:0.3.0") == 1
    assert set(images) == {"mine/cpu:0.2.0", "mine/gpu:0.3.0"}
    pod = workers["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert "tolerations" not in cluster["headGroupSpec"]["template"]["spec"]
    assert (workers["minReplicas"], workers["replicas"], cluster["enableInTreeAutoscaling"]) == (0, 0, True)
    allowed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert cluster["autoscalerOptions"]["securityContext"] == allowed
    for manifest in rendered:
        check_restricted(manifest)


def test_every_pod_may_be_pulled_and_has_room_on_the_disk() -> None:
    for path in MANIFESTS:
        for template in pods_of(load(path)):
            assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    for spec in cluster_specs().values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            resources = group["template"]["spec"]["containers"][0]["resources"]
            assert resources["requests"]["ephemeral-storage"] == resources["limits"]["ephemeral-storage"]


def test_the_driver_is_told_of_logins_by_secrets() -> None:
    """Where there are none, pods start all the same."""
    for spec in cluster_specs().values():
        head, *workers = (
            {one["name"]: one["valueFrom"]["secretKeyRef"] for one in group["template"]["spec"]["containers"][0]["env"]}
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        )
        assert set(head) == {"HF_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", WEBHOOK}
        assert all(one["optional"] is True for one in head.values())
        assert [set(one) for one in workers] == [{"HF_TOKEN"}]


def test_nightly_job_does_not_overlap_and_ends() -> None:
    spec = load(KUBERNETES / "cluster" / "cronjob.yaml")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["successfulJobsHistoryLimit"] > 0
    assert spec["failedJobsHistoryLimit"] > 0
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 0
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0


def test_kuberay_manifests_agree() -> None:
    specs = cluster_specs()
    assert specs["cluster"] == specs["rayjob"] == specs["raycronjob"]
    cron = load(KUBERNETES / "nightly" / "raycronjob.yaml")["spec"]
    assert cron["jobTemplate"] == load(KUBERNETES / "job" / "rayjob.yaml")["spec"]
    assert cron["schedule"] == load(KUBERNETES / "cluster" / "cronjob.yaml")["spec"]["schedule"]
    assert specs["cluster"]["rayVersion"] == pinned("ray")


def test_the_token_is_asked_for_everywhere() -> None:
    assert all(spec["authOptions"] == {"mode": "token"} for spec in cluster_specs().values())
    environment = {one["name"]: one for one in pod_of_cronjob()["spec"]["containers"][0]["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    # KubeRay keeps the token in a secret that is called as the cluster.
    secret = {"name": load(KUBERNETES / "cluster" / "cluster.yaml")["metadata"]["name"], "key": "auth_token"}
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


def test_compose_files() -> None:
    example = dict(re.findall(r"^(\w+)=(\S*)", (INFRA / "mlflow" / "env.example").read_text(), re.MULTILINE))
    needed: set[str] = set()
    for name in ("compose.yaml", "tls.yaml"):
        path = INFRA / "mlflow" / name
        jsonschema.validate(load(path), get_builtin_schema("vendor.compose-spec"))
        needed |= set(re.findall(r"\$\{(\w+):\?", path.read_text()))
    server = load(INFRA / "mlflow" / "compose.yaml")["services"]["mlflow"]
    assert server["environment"]["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql://")
    # Every variable without a default is in the example of settings, and has to be set.
    assert needed == {"POSTGRES_PASSWORD", "DOMAIN", "LOGIN_USER", "LOGIN_HASH"}
    assert {example[name] for name in needed} == {""}


def test_the_proxy_is_told_all_that_it_asks_for() -> None:
    proxy = load(INFRA / "mlflow" / "tls.yaml")["services"]["proxy"]
    asked = set(re.findall(r"\{\$(\w+)\}", (INFRA / "mlflow" / "Caddyfile").read_text()))
    assert asked == set(proxy["environment"])


def test_runtime_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    config = load(INFRA / "runtime_env.yaml")
    assert set(RuntimeEnv(**config, _validate=True)) == set(config)
