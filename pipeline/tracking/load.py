"""How MLflow loads a merged model: a few files that say where it is and what it needs; the weights stay in the store.

A model in a folder has these files in MLflow, with the folder's path in them. A model at a URL that MLflow can read has
them beside its weights as well, and the registered version points there.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlparse
from urllib.request import url2pathname

from fsspec import get_filesystem_class
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import save_model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.transformers.flavor_config import FlavorKey
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.tracking.network import MergedNetwork, network_of
from sensmerge.pipeline.tracking.requirements import copy_source, requirements
from sensmerge.tasks.checkpoints.companions import CONFIG, TOKENIZER
from sensmerge.tasks.dynamic.vectors import BASE
from sensmerge.tasks.networks.adapter_config import ADAPTER_CONFIG
from sensmerge.tasks.networks.pictures import Reads
from sensmerge.tasks.serving.form import Form, head_names

LOADER = "sensmerge.tasks.serving.scorer"
MLMODEL = "MLmodel"
NEEDED = (*TOKENIZER, CONFIG)
"""Patterns of the files of a merged model that are read here."""
COMPONENTS = "components"
"""Folder in which mlflow.transformers looks for tokenizers."""

PIPELINES: Mapping[Form, tuple[str, str, str]] = {
    "language_model": ("text-generation", "TextGenerationPipeline", "AutoModelForCausalLM"),
    "classifier": ("text-classification", "TextClassificationPipeline", "AutoModelForSequenceClassification"),
}
"""Of merges that are one whole network: task, pipeline and model class by which mlflow.transformers loads them.

transformers has no pipeline any more for encoder-decoders that write.
"""

_CLASSES: Mapping[Form, str] = {
    "encoder_decoder": "AutoModelForSeq2SeqLM",
    "picture_classifier": "AutoModelForImageClassification",
}
"""Of the other merges that are one whole network."""
_EXAMPLES: Mapping[Reads, str] = {
    "texts": "What is 3 plus 4?",
    "pictures": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==",
}
"""A text, and a picture of one grey pixel."""


@dataclass(frozen=True)
class Merged:
    """A merged model that MLflow is to know."""

    recipe: str
    variant: str
    kind: Literal["static", "dynamic"]
    folder: Path
    """where its small files are on this machine"""
    uri: str
    """where all who may read the store find it"""
    form: Form | None
    """of a static merge; None where it is no model that answers texts"""
    is_known: bool
    """whether a class of transformers reads it"""
    reads: Reads
    """what it answers, if it answers"""
    dtype: str
    """torch name of the dtype that its scores were taken in"""
    experts: tuple[str, ...]
    prompts: Mapping[str, Mapping[str, Any]]
    """what a static merge has to keep of the recipe's tasks, to be asked as they ask; a dynamic model has it itself"""

    @classmethod
    def of(cls, report: Report, variant: str) -> "Merged":
        """Return a variant of a report."""
        folder = Path(report.models[variant])
        kind: Literal["static", "dynamic"] = "dynamic" if variant in report.routes else "static"
        network = _network(folder, kind)
        experts = next(iter(report.variants[variant].weights.values()), {})
        return cls(
            report.recipe,
            variant,
            kind,
            folder,
            report.uris[variant],
            network.form,
            network.is_known,
            network.reads,
            report.dtype,
            tuple(experts),
            report.prompts if kind == "static" else {},
        )

    @property
    def place(self) -> str:
        """Path of a folder, or a URL."""
        return url2pathname(urlparse(self.uri).path) if self.is_local else self.uri

    @property
    def is_local(self) -> bool:
        """Whether the model is in a folder, not at a URL."""
        return self.uri.startswith("file:")

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter of the base."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def answers(self) -> bool:
        """Whether a pyfunc can answer texts or pictures with it."""
        return self.kind == "dynamic" or self.form is not None

    @property
    def loaders(self) -> list[str]:
        """What loads the registered version, or the folder itself."""
        if self.kind == "dynamic":
            return ["mlflow.pyfunc", "sensmerge"]
        if self.is_adapter:
            return ["peft"]
        if self.form is None:
            return ["transformers"] if self.is_known else []
        if self.form == "trunk":
            return ["mlflow.pyfunc"]
        is_read = self.form in PIPELINES and (self.is_local or self.is_read_by_mlflow)
        whole = ["mlflow.transformers"] if is_read else []
        return [*whole, "mlflow.pyfunc", "transformers"]

    @property
    def is_read_by_mlflow(self) -> bool:
        """Whether MLflow itself can download the model from its URL."""
        if self.is_local:
            return False
        try:
            get_artifact_repository(self.uri)
        except (MlflowException, ImportError):  # no such scheme, or no package for it
            return False
        return True


def _network(folder: Path, kind: Literal["static", "dynamic"]) -> MergedNetwork:
    if kind == "dynamic":
        from sensmerge.tasks.serving.static_model import reads_of  # transformers takes seconds

        return MergedNetwork(None, True, reads_of(folder, folder / BASE))
    return MergedNetwork(None, True, "texts") if (folder / ADAPTER_CONFIG).is_file() else network_of(folder)


def log_files(client: MlflowClient, model: LoggedModel, merged: Merged) -> None:
    """Make a LoggedModel load a merged model from where it is."""
    with TemporaryDirectory() as temporary:
        files = Path(temporary) / "model"
        mlmodel = Model(model.artifact_location, model.source_run_id, model_id=model.model_id)
        _write(files, merged, mlmodel, beside=False)
        client.log_model_artifacts(model.model_id, str(files))


def write_beside(merged: Merged) -> list[str]:
    """Write what MLflow loads a model by into the model's own folder, and return the names of the files."""
    with TemporaryDirectory() as temporary:
        files = Path(temporary) / "model"
        _write(files, merged, Model(), beside=True)
        names = sorted(str(path.relative_to(files)) for path in files.rglob("*") if path.is_file())
        shutil.copytree(files, merged.folder, dirs_exist_ok=True)
    return names


def _write(target: Path, merged: Merged, mlmodel: Model, beside: bool) -> None:
    settings: dict[str, Any] = {"device": "cpu", "dtype": merged.dtype}
    settings |= {} if beside else {"folder": merged.place}
    settings |= {"prompts": merged.prompts} if merged.prompts else {}
    pipeline = PIPELINES.get(merged.form) if merged.form and (beside or merged.is_local) else None
    if pipeline is not None:
        mlmodel.add_flavor("transformers", **_transformers_flavor(pipeline, merged, beside))
    fetching: list[str] = []
    if not beside and not merged.is_local:
        fetching = [get_filesystem_class(urlparse(merged.uri).scheme).__module__.partition(".")[0]]
    save_model(
        target,
        loader_module=LOADER,
        code_paths=[str(copy_source(target.parent))],
        model_config=settings,
        mlflow_model=mlmodel,
        signature=_signature(merged),
        input_example=[_EXAMPLES[merged.reads]],
        # Given, for MLflow would load the model in another process to find them out.
        pip_requirements=list(requirements(LOADER, *fetching)),
    )
    if pipeline is not None:
        tokenizer = target / COMPONENTS / FlavorKey.TOKENIZER
        for path in {path for pattern in NEEDED for path in merged.folder.glob(pattern)}:
            component = tokenizer / path.relative_to(merged.folder)
            component.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, component)


def _transformers_flavor(pipeline: tuple[str, str, str], merged: Merged, beside: bool) -> dict[str, Any]:
    """Return what mlflow.transformers finds a checkpoint by: beside the MLmodel, or by its path."""
    task, instance, model = pipeline
    where = {FlavorKey.MODEL_BINARY: "."} if beside else {FlavorKey.MODEL_LOCAL_BASE: merged.place}
    return where | {
        "transformers_version": metadata.version("transformers"),
        FlavorKey.TASK: task,
        FlavorKey.INSTANCE_TYPE: instance,
        FlavorKey.MODEL_TYPE: model,
        FlavorKey.TORCH_DTYPE: f"torch.{merged.dtype}",
        FlavorKey.COMPONENTS: [FlavorKey.TOKENIZER],
        FlavorKey.COMPONENT_TYPE.format(FlavorKey.TOKENIZER): "AutoTokenizer",
    }


def _signature(merged: Merged) -> ModelSignature:
    """Return what a pyfunc gives; an input schema would allow a table or a list, not both."""
    outputs, params = [ColSpec("string", "prediction")], []
    if merged.kind == "dynamic":
        outputs += [ColSpec("string", "expert")]
        outputs += [ColSpec("double", f"coefficient.{expert}") for expert in merged.experts]
    if merged.form in (None, "language_model", "encoder_decoder"):
        # None: what the model does of its own accord. A dynamic one may classify, and then takes none of them.
        kinds: dict[str, DataType] = {"max_new_tokens": DataType.long, "temperature": DataType.double}
        kinds |= {"top_p": DataType.double, "seed": DataType.long}
        params += [ParamSpec(name, kind, None) for name, kind in kinds.items()]
        params.append(ParamSpec("stop", DataType.string, [], shape=(-1,)))
    if merged.form == "trunk" or merged.reads == "texts":
        params.append(ParamSpec("task", DataType.string, None))
    return ModelSignature(outputs=Schema(outputs), params=ParamSchema(params) if params else None)


def description(merged: Merged, version: str) -> str:
    """Return what a registered version says of itself: what it is, and how it is loaded."""
    name = f"models:/{merged.recipe}/{version}"
    example = "a text" if not merged.answers or merged.reads == "texts" else "a picture in base64"
    pyfunc = f'mlflow.pyfunc.load_model("{name}").predict(["{example}"]'
    folder = f'"{merged.place}"'
    lines: Sequence[str]
    match merged.kind, merged.form:
        case "dynamic", _:
            what = "Dynamic: every input gets its own coefficients. sensmerge runs it; transformers cannot."
            lines = [f"{pyfunc})", f"sensmerge.DynamicModel.load(Path({folder}))"]
        case _, "trunk":
            heads = head_names(merged.folder)
            what = (
                f"Static: a trunk with the heads of {', '.join(heads)}; mlflow.transformers cannot load several heads."
            )
            lines = [f"{pyfunc}, params={json.dumps({'task': heads[0]})})"]
        case _, None if merged.is_adapter:
            what = "Static: a LoRA adapter of the base."
            lines = [f"PeftModel.from_pretrained(base, {folder})"]
        case _, None if not merged.is_known:
            what = "Static: safetensors, merged by the names of their tensors. What loads the base loads them."
            lines = [merged.place]
        case _, None:
            what = "Static: a Hugging Face checkpoint of a kind that MLflow cannot load."
            lines = [f"AutoModel.from_pretrained({folder})"]
        case _:
            form = merged.form
            assert form is not None
            what = "Static: a Hugging Face checkpoint."
            cls = PIPELINES[form][2] if form in PIPELINES else _CLASSES[form]
            lines = [f"{pyfunc})", f"transformers.{cls}.from_pretrained({folder})"]
            if "mlflow.transformers" in merged.loaders:
                lines = [f'mlflow.transformers.load_model("{name}")', *lines]
    code = "\n".join(f"    {line}" for line in lines)
    return f"{what} Scores were taken in {merged.dtype}.\n\n{code}\n"
