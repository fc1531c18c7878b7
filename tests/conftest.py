"""Tiny real models, a real tokenizer and one Ray cluster for all tests."""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sensmerge.pipeline.plan.models import hash_models, list_models
from sensmerge.pipeline.plan.plan import Plan, make_plan
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.store.earlier import EarlierArtifacts
from sensmerge.pipeline.store.store import Store
from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.kinds.kind import Labels, RowSet, RowTask
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import open_expert
from sensmerge.tasks.networks.networks import computation_digest
from sensmerge.tasks.registry import Registry
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.rows.stored import StoredRows
from sensmerge.tasks.stages.calibration import CalibrationSet
from sensmerge.tasks.stages.cross_task import CrossTaskJob
from sensmerge.tasks.stages.job import Job
from sensmerge.tasks.stages.statistics import StatisticsJob
from sensmerge.tasks.statistics.statistic import STATISTICS, read_layers
from tests.hub_server import HubServer
from tests.installed import installed as installed
from tests.installed import user_folder as user_folder
from tests.merged import assert_store_loads
from tests.mergekit import mergekit as mergekit

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Speed is not what these tests are about, and the machine may be busy.
hypothesis.settings.register_profile("sensmerge", deadline=None, max_examples=40)
hypothesis.settings.load_profile("sensmerge")
# Tiny tensors gain nothing from threads, which on a busy machine wait for each other.
torch.set_num_threads(1)
os.environ.pop("MLFLOW_TRACKING_URI", None)  # the tests record nothing where their user does


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the data beside the project, or a GPU, where there is none; what waits for Ray comes first."""
    on_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in on_ray)
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs ../shared"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Look no more for garbage among what was imported: of a million objects, every look takes a third of a second."""
    gc.collect()
    gc.freeze()


_ROWS = TemporaryDirectory(prefix="sensmerge-rows-")


def stored(rows: list[Row]) -> StoredRows:
    """Rows in a file that is there as long as the tests run."""
    found = StoredRows.of(rows, Path(_ROWS.name))
    found.write(rows)
    return found


def row_set(task: RowTask, rows: list[Row], labels: Labels | None = None) -> RowSet:
    """Rows of a task in a file, see `stored`."""
    return RowSet(task, stored(rows), labels)


def make_tokenizer(order: int = 1) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: begin, end, padding and 256 bytes, which with order -1 are numbered backwards."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[::order]
    vocabulary = {character: number for number, character in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def llama_config(**changes: object) -> LlamaConfig:
    """Two layers, hidden size 32, vocabulary of the `tokenizer` fixture."""
    settings = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def gpt2_config() -> GPT2Config:
    return GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)


def bert_config(labels: int = 2) -> BertConfig:
    return BertConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        num_labels=labels,
        pad_token_id=2,
    )


def perturbed(network: PreTrainedModel, seed: int, scale: float = 0.02) -> PreTrainedModel:
    """Change every weight of a network a little: a stand-in for a fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return network


def make_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes))


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(gpt2_config())


def make_bert_trunk() -> BertModel:
    torch.manual_seed(0)
    return BertModel(bert_config())


def make_bert_expert(trunk: BertModel, seed: int, labels: int) -> BertForSequenceClassification:
    """A classifier fine-tuned from a trunk: its tensor names have the prefix `bert.`, which the trunk's lack."""
    torch.manual_seed(seed)
    network = BertForSequenceClassification(bert_config(labels))
    network.bert.load_state_dict(trunk.state_dict())
    return perturbed(network, seed)


def make_adapter(network: PreTrainedModel, folder: Path, seed: int, **settings: object) -> Path:
    """Save a random LoRA adapter (with its modules_to_save) of a network, which is changed by it."""
    torch.manual_seed(seed)
    adapted = get_peft_model(network, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a network (and the tokenizer) as a Hugging Face folder and return it."""

    def save(network: PreTrainedModel, name: str, folder: Path | None = None, **options: object) -> Path:
        target = (folder or tmp_path_factory.mktemp("models")) / name
        network.save_pretrained(target, **options)
        tokenizer.save_pretrained(target)
        return target

    return save


@pytest.fixture(scope="session")
def llamas(save: Callable[..., Path]) -> dict[str, Path]:
    """A tiny Llama base (tied head) and the full fine-tunes math and code."""
    folders = {"base": save(make_llama(), "base")}
    return folders | {
        name: save(perturbed(make_llama(), seed), name) for seed, name in enumerate(("math", "code"), start=1)
    }


@pytest.fixture(scope="session")
def berts(save: Callable[..., Path]) -> dict[str, Path]:
    """A tiny BERT trunk and the classifiers mood (2 classes) and topic (3 classes)."""
    trunk = make_bert_trunk()
    return {
        "base": save(trunk, "base"),
        "mood": save(make_bert_expert(trunk, 1, 2), "mood"),
        "topic": save(make_bert_expert(trunk, 2, 3), "topic"),
    }


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write a JSON Lines data set."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_recipe(llamas: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A recipe for the tiny Llamas; its data sets are written to the folder."""
    for task, sign in (("math", "+"), ("code", "-")):
        # A tiny random network likes to repeat a token: of digits that do, it is right now and then.
        for file, numbers in ((f"{task}.jsonl", range(12)), (f"{task}-test.jsonl", range(22, 154, 11))):
            write_rows(folder / file, [{"prompt": f"{a}{sign}{a + 1}=", "completion": str(a)} for a in numbers])
    data = {
        task: {
            "kind": "completion",
            "calibration": {"path": "json", "data_files": f"{task}.jsonl", "samples": 3},
            "evaluation": {"path": "json", "data_files": f"{task}-test.jsonl", "samples": 6},
        }
        for task in ("math", "code")
    }
    return {
        "name": "tiny",
        "base": str(llamas["base"]),
        "experts": {name: {"model": str(llamas[name])} for name in ("math", "code")},
        "tasks": data,
        "merges": {
            "ta": {"method": "task_arithmetic", "weight": 0.5},
            "ties-sens": {"method": "ties", "density": 0.3, "coefficients": {"kind": "sens", "temperature": 0.3}},
        },
    }


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SENSMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on the loopback, which the hub's client asks."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3-compatible server on the loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The file system with the empty bucket `models`; this process and those that it starts find it by their
    environment."""
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.mkdir("models")
    yield files
    files.rm("models", recursive=True)


@pytest.fixture
def llama_recipe(llamas: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A recipe for the tiny Llamas, with its data in tmp_path; tests change it as they need."""
    return tiny_recipe(llamas, tmp_path)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The one Ray cluster of a process's tests: two CPUs on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    from sensmerge.pipeline.execute import cluster as workflow
    from tests.kept_ray import KeptConnection

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workflow, "ray", KeptConnection(cluster.address))
        yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def ray_here(ray_address: str) -> Iterator[None]:
    """A connection of this process to the tests' cluster."""
    from sensmerge.pipeline.execute.cluster import cluster

    with cluster(ray_address):
        yield


class TaskRows(NamedTuple):
    """A task and its calibration rows."""

    task: RowTask
    rows: list[Row]


def calibration_set(task: RowTask, rows: list[Row], folder: Path) -> CalibrationSet:
    """A calibration set whose rows are written to a folder."""
    stored = StoredRows.of(rows, folder)
    stored.write(rows)
    return CalibrationSet(task, stored)


def statistics_job(
    base: Path, expert: Path, calibration: CalibrationSet, statistics: Iterable[str] = ("sensitivity",), **settings: Any
) -> StatisticsJob:
    """The job that measures statistics of the expert `math`, float32 and whole on the CPU unless settings say more."""
    found = {name: STATISTICS[name]() for name in statistics}
    parts = {"base": base, "expert": expert, "tokenizer": base}
    fields = {name: Artifact(str(folder), folder) for name, folder in parts.items()}
    usual = {"base_config": False, "dtype": "float32", "name": "math", "device": "cpu", "placement": "whole"}
    return StatisticsJob(**fields, calibration=calibration, statistics=found, **(usual | settings))


def measure_sensitivity(
    base: Path, expert: Path, task: RowTask, rows: list[Row], out: Path, **settings: Any
) -> dict[str, float]:
    """Measure the sensitivity of an expert by layer; settings as in `statistics_job`."""
    job = statistics_job(base, expert, calibration_set(task, rows, out.parent / "rows"), **settings)
    job.finish(out)
    return read_layers(out, "sensitivity")


def cross_task_job(
    base: Path, experts: Mapping[str, Path], sets: Mapping[str, TaskRows], **settings: Any
) -> CrossTaskJob:
    """The job that measures all distances, float32 and whole on the CPU unless settings say more."""
    rows = base.parent / "rows"
    opened = open_base(base)
    configs = {name: open_expert(folder, opened, f"experts.{name}").config for name, folder in experts.items()}
    usual = {"base_config": frozenset(), "dtype": "float32", "device": "cpu", "placement": "whole"}
    return CrossTaskJob(
        base=Artifact(str(base), base),
        experts={name: Artifact(str(folder), folder) for name, folder in experts.items()},
        calibration={name: calibration_set(*sets[name], rows) for name in experts},
        tokenizer=Artifact(str(base), base),
        heads={name: computation_digest(config) for name, config in configs.items()},
        **(usual | settings),
    )


def do_job(job: Job, out: Path) -> dict[str, Any]:
    """Do all pieces of a job and return its result."""
    for part in job.parts():
        job.run(part, out)
    return job.finish(out)


def write_recipe(folder: Path, recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
    """Write a recipe as YAML and return its path."""
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def plan_of(folder: Path, recipe: dict[str, Any], *overrides: str, store: str = "store") -> Plan:
    """Write a recipe to a folder and plan it, with a store in the same folder."""
    loaded, target = load_recipe(write_recipe(folder, recipe), overrides), Store(folder / store)
    listings = list_models(loaded, folder, target.hub_cache)
    return make_plan(loaded, folder, target, hash_models(listings, target.hub_cache))


def command_line(*arguments: object) -> int:
    """Run `python -m pipeline` with these arguments in this process and return its exit status.

    What may get as far as Ray needs the `--address` of the tests' cluster: a process that has started a cluster of its
    own loses its actors in that one.
    """
    from sensmerge.pipeline.cli import main

    before = sys.argv
    sys.argv = ["sensmerge", *map(str, arguments)]
    try:
        main()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        sys.argv = before
    if arguments[0] in ("run", "refresh") and "--store" in arguments:
        assert_store_loads(Path(str(arguments[arguments.index("--store") + 1])))
    return 0


def do_steps(plan: Plan) -> None:
    """Do the steps of a plan that its store lacks in this process, one after the other, and publish their artifacts."""
    plan.write_rows()
    for step in plan.steps:
        if step.title not in plan.todo:
            continue
        out = plan.store.partial(step.key)
        out.mkdir(parents=True, exist_ok=True)
        job = step.job.resumed(EarlierArtifacts(plan.store, step.key))
        result = do_job(job, out)
        took = dict.fromkeys(("seconds", "bytes", "peak_memory", "pieces", "pieces_run"), 0)
        plan.store.publish(step.key, {**took, "node": "here", "result": result}, result.get("by_tensor", ()))
    assert_store_loads(plan.store.root)


@contextmanager
def forgotten(*registries: Registry[Any]) -> Iterator[None]:
    """What is registered within the block is forgotten after it: other tests look at all that is registered."""
    before = [dict(registry) for registry in registries]
    yield
    for registry, classes in zip(registries, before, strict=True):
        registry._classes.clear()
        registry._classes.update(classes)


@contextmanager
def known(registry: Registry[Any], **classes: type) -> Iterator[None]:
    """Classes that a registry knows, by their names, until the block is left."""
    with forgotten(registry):
        for name, one in classes.items():
            registry.register(name)(one)
        yield
