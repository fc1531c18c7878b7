"""What the census looks at: of one architecture a base with two full fine-tunes and two LoRA adapters, on disk."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.image_classification import ImageClassificationTask
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.kinds.seq2seq import Seq2SeqTask
from tests.census.networks import tiny_config, tiny_network
from tests.census.tiny import tiny_network as tiny_trunk
from tests.conftest import do_job, make_adapter, make_tokenizer, perturbed, plan_of, write_rows
from tests.pictures import in_base64, picture

Rows = list[dict[str, object]]
EXPERTS = ("first", "second")
CLASSES = {"first": 3, "second": 4}
"""How many an expert tells apart, if it is a classifier."""
_TEXTS: Mapping[str, Rows] = {
    "first": [{"prompt": "1+2=", "completion": "3"}, {"prompt": "a longer prompt: ", "completion": "yes or no"}],
    "second": [{"prompt": "def f(x):", "completion": " return x"}, {"prompt": "xyz", "completion": "abc"}],
}
_SEQ2SEQ = {"source": "{prompt}", "target": "{completion}"}
_CLASSIFIED: Mapping[str, Rows] = {
    "first": [{"text": "good", "label": 0}, {"text": "not as good as that", "label": 2}],
    "second": [{"text": "where is it?", "label": 1}, {"text": "when", "label": 0}],
}
_PICTURES: Mapping[str, Rows] = {
    "first": [{"image": in_base64(picture(0, 0)), "label": 0}, {"image": in_base64(picture(1, 0)), "label": 2}],
    "second": [{"image": in_base64(picture(2, 2)), "label": 1}, {"image": in_base64(picture(3, 2)), "label": 0}],
}


@dataclass(frozen=True)
class Case:
    """One architecture."""

    name: str
    """of the class of its networks"""
    folder: Path

    @property
    def classifies(self) -> bool:
        """Whether the experts are classifiers, each with classes of its own, fine-tuned from a trunk without a head."""
        return self.name.endswith("Classification")

    @property
    def writes(self) -> bool:
        """Whether the experts are encoder-decoders that answer texts with texts."""
        return self.name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()

    @property
    def reads_pictures(self) -> bool:
        """Whether these classifiers read pictures."""
        return self.name.endswith("ForImageClassification")

    @property
    def task(self) -> RowTask:
        """The experts' kind of task, with all settings left out."""
        if self.reads_pictures:
            return ImageClassificationTask(kind="image_classification")
        if self.classifies:
            return ClassificationTask(kind="classification")
        if self.writes:
            return Seq2SeqTask(kind="seq2seq", **_SEQ2SEQ)
        return CompletionTask(kind="completion")

    @property
    def rows(self) -> Mapping[str, Rows]:
        """Rows of each expert's task."""
        if self.reads_pictures:
            return _PICTURES
        return _CLASSIFIED if self.classifies else _TEXTS

    @property
    def base(self) -> Path:
        """The base with its tokenizer."""
        return self.folder / "base"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all models."""
        return AutoTokenizer.from_pretrained(self.base)

    def pixels(self, row: Mapping[str, object]) -> Tensor:
        """What transformers' image processor makes of the picture in a row, (1, 3, height, width)."""
        processor = AutoImageProcessor.from_pretrained(self.base, backend="pil")
        with Image.open(io.BytesIO(base64.b64decode(str(row["image"])))) as image:
            found: Tensor = processor(image, return_tensors="pt")["pixel_values"]
        return found

    def experts(self, kind: str) -> dict[str, Path]:
        """Folders by name; `kind` is `full` or `lora`."""
        return {name: self.folder / kind / name for name in EXPERTS}

    def network(self, folder: Path) -> PreTrainedModel:
        """A full fine-tune or the base, as transformers loads it."""
        (name,) = json.loads((folder / "config.json").read_text())["architectures"]
        return getattr(transformers, name).from_pretrained(folder).eval()

    def recipe(self, kind: str, merge: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        """A recipe that merges the experts, of which each has a task."""
        return {**self.static_recipe({"merged": merge}, kind), "tasks": self.tasks("calibration"), **settings}

    def tasks(self, split: str) -> dict[str, Any]:
        """The tasks of a recipe, each with its rows as one split."""
        sets = {name: {"path": "json", "data_files": str(self.folder / f"{name}.jsonl")} for name in EXPERTS}
        settings = {"kind": self.task.kind, **(_SEQ2SEQ if self.writes else {})}
        return {name: {**settings, split: one} for name, one in sets.items()}

    def static_recipe(self, merges: Mapping[str, Mapping[str, Any]], kind: str = "full") -> dict[str, Any]:
        """A recipe that merges the experts, without tasks."""
        return {
            "name": "census",
            "base": str(self.base),
            "experts": {name: {"model": str(folder)} for name, folder in self.experts(kind).items()},
            "merges": {name: dict(merge) for name, merge in merges.items()},
            "dtype": "float32",
        }

    def plan(self, recipe: dict[str, Any], name: str) -> Plan:
        """Plan a recipe in a folder of its own."""
        folder = self.folder / f"plan-{name}"
        folder.mkdir(exist_ok=True)
        return plan_of(folder, recipe)


def do(plan: Plan) -> Plan:
    """Do the steps of a plan in this process, one after the other, and return it."""
    plan.write_rows()
    for step in plan.steps:
        out = plan.store.partial(step.key)
        out.mkdir(parents=True)
        plan.store.publish(step.key, do_job(step.job, out))
    return plan


def make_case(name: str, folder: Path, lora: bool = True) -> Case:
    """Make base and experts of a class of networks.

    Raises:
        Exception: transformers or peft cannot.
    """
    case, cls = Case(name, folder), getattr(transformers, name)
    network = tiny_trunk(MODEL_MAPPING[cls.config_class], tiny_config(cls)) if case.classifies else tiny_network(name)
    _save(network, case.base)
    for seed, expert in enumerate(EXPERTS, start=1):
        write_rows(folder / f"{expert}.jsonl", case.rows[expert])
        classes = {"num_labels": CLASSES[expert]} if case.classifies else {}
        torch.manual_seed(seed)
        _save(
            _moved(perturbed(cls.from_pretrained(case.base, **classes), seed, 0.05), seed), case.experts("full")[expert]
        )
        if lora:
            _make_adapter(case, case.experts("lora")[expert], seed)
    return case


def _save(network: PreTrainedModel, folder: Path) -> None:
    """Save a network with what turns texts into its inputs, or a file that says how images or sounds are."""
    _with_padding(network).save_pretrained(folder)
    others = [name for name in network.config.sub_configs if "text" not in name]
    if network.main_input_name != "input_ids" or others:
        size = getattr(network.config, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        about = {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
        write_json(folder / "preprocessor_config.json", {**about, "do_normalize": True})
    if network.main_input_name != "input_ids" and not others:
        return
    tokenizer = make_tokenizer()
    if network.config.is_encoder_decoder:
        end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = end
    tokenizer.save_pretrained(folder)


def _moved(network: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Change the statistics that a network has beside its parameters, such as running means, as training does."""
    for name in statistics(network):
        network.get_buffer(name).add_(0.01 * seed)
    return network


def statistics(network: PreTrainedModel) -> list[str]:
    """Return the names of a network's buffers of floating-point numbers that files hold."""
    saved = network.state_dict()
    return [name for name, buffer in network.named_buffers() if name in saved and buffer.is_floating_point()]


def _with_padding(network: PreTrainedModel) -> PreTrainedModel:
    """Give the padding token the zeros that no training changes and some networks get whenever they are loaded."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return network


def _make_adapter(case: Case, folder: Path, seed: int) -> None:
    """Save an adapter of the base's linear layers.

    Of mixtures, peft takes layers that are called as those of their experts for parameters of all experts in one
    (`target_parameters`), which plan refuses by name: they are left out.
    """
    network = case.network(case.base)
    make_adapter(network, folder, seed, target_modules=_linear(network))
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["target_parameters"]:
        make_adapter(case.network(case.base), folder, seed, target_modules=config["target_modules"])


def _linear(network: PreTrainedModel) -> list[str]:
    """Return the linear layers that adapters are made for: all, but for the head and what peft refuses in Mambas."""
    head = network.get_output_embeddings()
    model_type = network.config.get_text_config().model_type
    refused = ("out_proj",) if model_type in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h") else ()
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not name.endswith(refused)
    ]


Column = Callable[[Case], str]
"""Tries one thing with a case; returns `right`, or `wrong`, `refused` or `failed` with a reason behind a colon."""
