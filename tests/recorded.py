"""Models of the hub as a recorded hub has them: real configs, names, shapes, dtypes and sizes; no values.

They are made from the configs of their architectures. Tokenizers are stand-ins of the right size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sensmerge.tasks.checkpoints.planned import CheckpointPlan, plan_checkpoint, preallocate
from tests.hub_server import Content, Recorded
from tests.pictures import in_base64, picture

LLAMA = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
MISTRAL = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "sliding_window": 4096}
PICTURES = [f"tanganke/{name}" for name in ("sun397", "stanford_cars", "resisc45", "eurosat", "gtsrb", "dtd")]
PICTURES += ["ufldl-stanford/svhn", "ylecun/mnist"]
"""Data sets of pictures, of ten classes at least."""
SHARD_SIZE = 10_000_000_000


@dataclass(frozen=True)
class Model:
    """One model of the hub."""

    network: type[PreTrainedModel]
    config: PretrainedConfig
    dtype: torch.dtype
    architecture: str = ""
    """what the config says; if empty, the class of the network"""
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """tensors that no parameter has"""
    added: tuple[str, ...] = ()
    """tokens of its own, behind those of its base"""
    prefix: str = ""
    """what files of the hub have before the names of parameters"""

    reads_words: bool = False
    """whether its tokens are words, as far as that stand-in can tell, and not bytes"""

    @property
    def has_tokenizer(self) -> bool:
        """Whether it reads texts."""
        return hasattr(self.config.get_text_config(), "vocab_size")

    def plan(self) -> CheckpointPlan:
        """Return its weights as files: headers, sizes, index. No parameter of it is tied to another."""
        with torch.device("meta"):
            network = self.network(self.config)
        own = {f"{self.prefix}{name}": tuple(one.shape) for name, one in network.state_dict().items()}
        return plan_checkpoint({name: (self.dtype, shape) for name, shape in {**own, **self.more}.items()}, SHARD_SIZE)

    def config_text(self, repo: str = "") -> str:
        """Return the content of its config.json, which names its repository: else, two may have the same files."""
        name = self.architecture or self.network.__name__
        settings = {"_name_or_path": repo, "architectures": [name], "dtype": str(self.dtype).partition(".")[2]}
        return json.dumps(self.config.to_dict() | settings)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer of bytes that has as many tokens as the base's vocabulary, and its own behind them."""
        tokenizer = make_tokenizer(self.config.get_text_config().vocab_size - len(self.added), self.reads_words)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.added)})
        return tokenizer

    def files(self, repo: str) -> dict[str, Content]:
        """Return its files as the hub lists them for a repository."""
        plan = self.plan()
        found: dict[str, Content] = {name: Recorded(head, plan.sizes[name]) for name, head in plan.headers.items()}
        found["config.json"] = self.config_text(repo).encode()
        if plan.index is not None:
            found["model.safetensors.index.json"] = plan.index.encode()
        if not self.has_tokenizer:
            return found
        with TemporaryDirectory() as folder:
            self.tokenizer().save_pretrained(folder)
            return found | {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def save(self, folder: Path) -> None:
        """Write it to a folder, its weights as sparse files."""
        preallocate(self.plan(), folder)
        (folder / "config.json").write_text(self.config_text())
        if self.has_tokenizer:
            self.tokenizer().save_pretrained(folder)


def make_tokenizer(size: int, reads_words: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of so many tokens, most of which no text has: of bytes, or of words that are all unknown."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<{number}>" for number in range(size - len(tokens))]
    own = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    if reads_words:
        own = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, "<unk>"))
        own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        own.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _llama(dtype: torch.dtype) -> Model:
    """Return a Llama as versions of transformers wrote it that stored its rotary frequencies, too."""
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (64,) for layer in range(32)}
    return Model(LlamaForCausalLM, LlamaConfig(**LLAMA), dtype, more=frequencies)


def _mistral(dtype: torch.dtype, **changes: Any) -> Model:
    return Model(MistralForCausalLM, MistralConfig(**{**MISTRAL, "rope_theta": 10000.0, **changes}), dtype)


def _gpt2(labels: int) -> Model:
    config = GPT2Config(num_labels=labels, pad_token_id=50256)
    return Model(GPT2ForSequenceClassification, config, torch.float32)


@cache
def hub_models() -> dict[str, Model]:
    """Return what is recorded of the hub, by repository."""
    masks = {f"h.{layer}.attn.bias": (1, 1, 1024, 1024) for layer in range(12)}
    pictures = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
    glue = {"cola": 2, "mnli": 3, "mrpc": 2, "qnli": 2, "qqp": 2, "rte": 2, "sst2": 2}
    return {
        "meta-llama/Llama-2-7b-hf": _llama(torch.float16),
        "meta-llama/Llama-2-7b-chat-hf": _llama(torch.float16),
        "mrm8488/llama-2-coder-7b": _llama(torch.bfloat16),
        "mistralai/Mistral-7B-v0.1": _mistral(torch.bfloat16),
        "mistralai/Mistral-7B-Instruct-v0.1": _mistral(torch.bfloat16),
        "mistralai/Mistral-7B-Instruct-v0.2": _mistral(torch.bfloat16, rope_theta=1e6, sliding_window=None),
        "TIGER-Lab/MAmmoTH2-7B": _mistral(torch.bfloat16),
        "Nondzu/Mistral-7B-codealpaca-lora": _mistral(torch.float16),
        "openai-community/gpt2": Model(GPT2Model, GPT2Config(), torch.float32, "GPT2LMHeadModel", masks),
        **{f"tanganke/gpt2_{task}": _gpt2(labels) for task, labels in glue.items()},
        **{f"tanganke/clip-vit-base-patch32_{task}": vision_tower("vision_model.") for task in pictures},
    }


def clip() -> Model:
    """CLIP ViT-B/32 as `save_pretrained` writes it, but for its image processor."""
    config = CLIPConfig(vision_config={"patch_size": 32}, projection_dim=512)
    return Model(CLIPModel, config, torch.float32, reads_words=True)


def vision_tower(prefix: str = "") -> Model:
    """CLIP ViT-B/32's vision tower as `save_pretrained` writes it; by older versions, with a prefix."""
    return Model(CLIPVisionModel, CLIPVisionConfig(patch_size=32), torch.float32, prefix=prefix)


def mammoth() -> Model:
    """MAmmoTH-7B as `save_pretrained` writes it: one token more than its base, in float32."""
    return Model(LlamaForCausalLM, LlamaConfig(**{**LLAMA, "vocab_size": 32001}), torch.float32, added=("[PAD]",))


def rows(path: str, name: str | None, numbers: range) -> list[dict[str, object]]:
    """Return rows with the fields of a data set of the hub."""
    make = {
        "cais/mmlu": lambda i: {"question": f"{i}+0?", "subject": "x", "choices": [*"0123"], "answer": i % 4},
        "openai/gsm8k": lambda i: {"question": f"{i}+0?", "answer": f"It is {i}.\n#### {i}"},
        "google-research-datasets/mbpp": lambda i: {
            "task_id": i,
            "text": f"Write f that gives {i}.",
            "code": f"def f():\n    return {i}",
            "test_list": [f"assert f() == {i}"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        "nyu-mll/glue": lambda i: _glue(str(name), i),
        **dict.fromkeys(PICTURES, _picture),
    }[path]
    return [make(number) for number in numbers]


def _picture(i: int) -> dict[str, object]:
    return {"image": in_base64(picture(i, i % 3)), "label": i % 10}


def _glue(name: str, i: int) -> dict[str, object]:
    fields = {"mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"), "qqp": ("question1", "question2")}
    fields |= {"cola": ("sentence",), "sst2": ("sentence",)}
    texts = dict.fromkeys(fields.get(name, ("sentence1", "sentence2")), f"{name} {i}.")
    return {**texts, "label": i % 2, "idx": i}
