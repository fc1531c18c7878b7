import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from sensmerge.tasks.checkpoints.checkpoint import DTYPES, INDEX, WEIGHTS
from sensmerge.tasks.checkpoints.planned import CheckpointWriter, plan_checkpoint, preallocate
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.expert import Expert, load_network, open_expert
from tests.conftest import bert_config, gpt2_config, llama_config, make_bert_trunk, make_gpt2, make_llama, perturbed

IDS = torch.arange(3, 20)[None]
SMALL: dict[str, Any] = {"vocab_size": 259, "max_position_embeddings": 128}


def roberta_config(labels: int = 2) -> RobertaConfig:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return RobertaConfig(**SMALL, **size, num_labels=labels)


def distilbert_config(labels: int = 2) -> DistilBertConfig:
    return DistilBertConfig(**SMALL, dim=32, n_layers=2, n_heads=4, hidden_dim=48, num_labels=labels)


def mixtral_config() -> MixtralConfig:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return MixtralConfig(**SMALL, **size, num_key_value_heads=2, num_local_experts=3)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Rewrite the tensors of a checkpoint."""
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the hub's GPT-2 is stored: no prefix, and the causal mask of every block."""
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 128, 128).tril() for block in range(2)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def legacy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the hub's bert-base-uncased is stored: old names of norms, position ids in the file."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    return renamed | {"bert.embeddings.position_ids": torch.arange(128)[None]}


def with_rotary(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As Llama 2 is stored: rotary frequencies in every block."""
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}


def only_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied weights under the name of the head, as `safetensors.torch.save_model` keeps them."""
    return {
        "lm_head.weight" if name == "model.embed_tokens.weight" else name: tensor for name, tensor in tensors.items()
    }


def also_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def same(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


@dataclass(frozen=True)
class Case:
    """A base as it is stored, and an expert of it."""

    base: Callable[[], PreTrainedModel]
    expert: Callable[[], PreTrainedModel]
    stored: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = same
    """the base's file"""
    expert_stored: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = same
    head: str = "causal_lm"
    own_head: frozenset[str] = frozenset()
    """tensors of the expert alone"""
    untouched: int = 0
    """how many of the base's weights the expert does not have"""

    def folders(self, save: Callable[..., Path], folder: Path) -> tuple[Path, Path]:
        torch.manual_seed(0)
        base = edit(save(self.base(), "base", folder), self.stored)
        return base, edit(save(perturbed(self.expert(), 1), "expert", folder), self.expert_stored)


CLASSIFIER = frozenset({"classifier.weight", "classifier.bias"})
POOLER = frozenset({"bert.pooler.dense.weight", "bert.pooler.dense.bias"})
CASES = {
    "llama": Case(make_llama, make_llama),
    "llama-untied": Case(lambda: make_llama(tie_word_embeddings=False), lambda: make_llama(tie_word_embeddings=False)),
    "llama-tied-stored-twice": Case(make_llama, make_llama, also_head),
    "llama-expert-tied-stored-twice": Case(make_llama, make_llama, same, also_head),
    "llama-tied-stored-as-head": Case(make_llama, make_llama, only_head),
    "llama-expert-tied-stored-as-head": Case(make_llama, make_llama, same, only_head),
    "llama-2-base": Case(make_llama, make_llama, with_rotary),
    "llama-2-expert": Case(make_llama, make_llama, same, with_rotary),
    "llama-trunk": Case(lambda: LlamaModel(llama_config()), make_llama),
    "llama-classifier": Case(
        make_llama,
        lambda: LlamaForSequenceClassification(llama_config(num_labels=3)),
        head="classification",
        own_head=frozenset({"score.weight"}),
    ),
    "llama-untied-classifier": Case(
        lambda: make_llama(tie_word_embeddings=False),
        lambda: LlamaForSequenceClassification(llama_config(num_labels=3, tie_word_embeddings=False)),
        head="classification",
        own_head=frozenset({"score.weight"}),
        untouched=1,
    ),
    "mixtral": Case(lambda: MixtralForCausalLM(mixtral_config()), lambda: MixtralForCausalLM(mixtral_config())),
    "gpt2": Case(make_gpt2, make_gpt2),
    "gpt2-hub": Case(make_gpt2, make_gpt2, without_prefix),
    "gpt2-hub-expert": Case(make_gpt2, make_gpt2, same, without_prefix),
    "gpt2-hub-classifier": Case(
        make_gpt2,
        lambda: GPT2ForSequenceClassification(gpt2_config()),
        without_prefix,
        head="classification",
        own_head=frozenset({"score.weight"}),
    ),
    "bert-trunk": Case(
        lambda: BertModel(bert_config()),
        lambda: BertForSequenceClassification(bert_config(3)),
        head="classification",
        own_head=CLASSIFIER,
    ),
    "bert-masked": Case(
        lambda: BertForMaskedLM(bert_config()),
        lambda: BertForSequenceClassification(bert_config(3)),
        head="classification",
        own_head=CLASSIFIER | POOLER,
        untouched=5,
    ),
    "bert-pretraining": Case(
        lambda: BertForPreTraining(bert_config()),
        lambda: BertForSequenceClassification(bert_config(2)),
        head="classification",
        own_head=CLASSIFIER,
        untouched=7,
    ),
    "bert-hub": Case(
        lambda: BertForPreTraining(bert_config()),
        lambda: BertForSequenceClassification(bert_config(2)),
        legacy,
        head="classification",
        own_head=CLASSIFIER,
        untouched=7,
    ),
    "bert-old-expert": Case(
        lambda: BertModel(bert_config()),
        lambda: BertForSequenceClassification(bert_config(2)),
        same,
        legacy,
        head="classification",
        own_head=CLASSIFIER,
    ),
    "bert-other-classes": Case(
        lambda: BertForSequenceClassification(bert_config(2)),
        lambda: BertForSequenceClassification(bert_config(3)),
        head="classification",
        own_head=CLASSIFIER,
        untouched=2,
    ),
    "bert-same-classes": Case(
        lambda: BertForSequenceClassification(bert_config(3)),
        lambda: BertForSequenceClassification(bert_config(3)),
        head="classification",
    ),
    "roberta": Case(
        lambda: RobertaForMaskedLM(roberta_config()),
        lambda: RobertaForSequenceClassification(roberta_config(4)),
        head="classification",
        own_head=frozenset(
            f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
        ),
        untouched=5,
    ),
    "distilbert": Case(
        lambda: DistilBertForMaskedLM(distilbert_config()),
        lambda: DistilBertForSequenceClassification(distilbert_config(4)),
        head="classification",
        own_head=CLASSIFIER | {"pre_classifier.weight", "pre_classifier.bias"},
        untouched=5,
    ),
}


def logits(network: PreTrainedModel) -> torch.Tensor:
    # Of a copy: weights mapped from a file lie at other addresses, for which the kernels may add in another order.
    with torch.no_grad():
        result: torch.Tensor = copy.deepcopy(network).eval()(IDS).logits
    return result


def theirs(folder: Path, head: str) -> PreTrainedModel:
    """Load a folder as a user of transformers would."""
    auto = AutoModelForCausalLM if head == "causal_lm" else AutoModelForSequenceClassification
    network: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.float32)
    return network


def merged_into_one(expert: Expert, folder: Path) -> Base:
    """Write a merged model whose weights are those of a single expert."""
    base = expert.base
    names = (*base.weights, *base.buffers)
    plan = plan_checkpoint({name: (base.dtype(name), base.info(name).shape) for name in names}, 20_000)
    preallocate(plan, folder)
    for name in names:
        with CheckpointWriter(plan, folder) as writer:
            writer.write(name, expert.read(name))
    shutil.copyfile(base.folder / "config.json", folder / "config.json")
    return open_base(folder)


@pytest.mark.parametrize("name", CASES)
def test_network_of_an_expert(name: str, save: Callable[..., Path], tmp_path: Path) -> None:
    """The expert through the base's names gives transformers' very logits, and so does a merge of it alone."""
    case = CASES[name]
    base_folder, folder = case.folders(save, tmp_path)
    base = open_base(base_folder)
    expert = open_expert(folder, base, "experts.x")
    assert set(expert.head) == case.own_head
    assert len(base.weights) - sum(map(expert.touches, base.weights)) == case.untouched
    head_of = expert if expert.head else None
    wanted = logits(theirs(folder, case.head))
    assert torch.equal(logits(load_network(expert, case.head, torch.float32, "cpu", head_of)), wanted)
    merged = merged_into_one(expert, tmp_path / "merged")
    assert torch.equal(logits(load_network(merged, case.head, torch.float32, "cpu", expert)), wanted)
    assert {file.name for file in merged.folder.iterdir()} > {INDEX}


@pytest.mark.parametrize("name", [name for name in CASES if name != "mixtral"])
def test_every_tensor_is_matched_with_its_own(name: str, save: Callable[..., Path], tmp_path: Path) -> None:
    """Each task vector is the difference of the parameters in the two networks that transformers loads."""
    case = CASES[name]
    base_folder, folder = case.folders(save, tmp_path)
    base = open_base(base_folder)
    expert = open_expert(folder, base, "experts.x")
    before = parameters(type(case.base()).from_pretrained(base_folder), base)
    after = parameters(type(case.expert()).from_pretrained(folder), base)
    for tensor in base.weights:
        key = base.network_name(tensor)
        assert torch.equal(base.read(tensor), before[key])
        if expert.touches(tensor):
            assert torch.equal(expert.read(tensor), after[key])
            assert torch.equal(expert.delta(tensor), after[key] - before[key])
        else:
            assert torch.equal(expert.read(tensor), before[key])
            assert not expert.delta(tensor).any()


def parameters(network: PreTrainedModel, base: Base) -> dict[str, torch.Tensor]:
    return {base.network_name(name): parameter.detach() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.head == "causal_lm"])
def test_network_of_a_base(name: str, save: Callable[..., Path], tmp_path: Path) -> None:
    case = CASES[name]
    folder, _ = case.folders(save, tmp_path)
    network = load_network(open_base(folder), "causal_lm", torch.float32, "cpu")
    assert torch.equal(logits(network), logits(theirs(folder, "causal_lm")))
    assert not network.training
    assert not network.config.tie_word_embeddings or network.lm_head.weight is network.get_input_embeddings().weight


def test_the_trunk_of_a_base_with_the_head_of_an_expert(berts: dict[str, Path]) -> None:
    base = open_base(berts["base"])
    expert = open_expert(berts["topic"], base, "experts.topic")
    reference = theirs(berts["topic"], "classification")
    reference.bert.load_state_dict(BertModel.from_pretrained(berts["base"]).state_dict())
    network = load_network(base, "classification", torch.float32, "cpu", head_of=expert)
    assert torch.equal(logits(network), logits(reference))
    assert network.config.num_labels == 3


def test_heads_of_several_experts(berts: dict[str, Path]) -> None:
    base = open_base(berts["base"])
    mood, topic = (open_expert(berts[name], base, f"experts.{name}") for name in ("mood", "topic"))
    shapes = [expert.head_tensors()["classifier.weight"].shape for expert in (mood, topic)]
    assert shapes == [(2, 32), (3, 32)]
    assert base.names.prefix == "bert."
    assert mood.own["encoder.layer.0.output.dense.weight"] == "bert.encoder.layer.0.output.dense.weight"


def test_network_in_another_dtype(save: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(LlamaForSequenceClassification(llama_config()), "expert", tmp_path)
    expert = open_expert(folder, open_base(save(make_llama(), "base", tmp_path)), "experts.x")
    network = load_network(expert, "classification", torch.bfloat16, "cpu", head_of=expert)
    reference = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(network), logits(reference))


def test_a_network_without_a_head(berts: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"no fitting weights for classifier.bias, classifier.weight of BertFor"):
        load_network(open_base(berts["base"]), "classification", torch.float32, "cpu")


def test_a_head_of_other_classes_than_the_config_says(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(BertForSequenceClassification(bert_config(3)), "base", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "a", "1": "b"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"classifier.weight has shape \(3, 32\), its config asks for \(2, 32\)"):
        open_base(folder)


@pytest.mark.parametrize("name", ["llama", "llama-tied-stored-twice", "llama-untied", "gpt2-hub", "mixtral"])
def test_weights_come_in_network_order_with_tied_ones_once(
    name: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    folder, _ = CASES[name].folders(save, tmp_path)
    base = open_base(folder)
    order = [base.network_name(name) for name, _ in theirs(folder, "causal_lm").named_parameters()]
    found = [base.network_name(name) for name in base.weights]
    assert list(dict.fromkeys(found)) == order
    assert name == "mixtral" or len(found) == len(order)


def test_what_is_no_weight_is_copied(save: Callable[..., Path], tmp_path: Path) -> None:
    bert = open_base(CASES["bert-hub"].folders(save, tmp_path / "bert")[0])
    assert bert.buffers == ("bert.embeddings.position_ids",)
    assert bert.dtype("bert.embeddings.position_ids") == torch.int64
    assert "bert.embeddings.LayerNorm.gamma" in bert.weights
    gpt2 = open_base(CASES["gpt2-hub"].folders(save, tmp_path / "gpt2")[0])
    assert gpt2.buffers == ("h.0.attn.bias", "h.1.attn.bias")
    assert "h.0.attn.c_attn.bias" in gpt2.weights
    llama = open_base(CASES["llama-2-base"].folders(save, tmp_path / "llama")[0])
    assert [name.split(".")[-1] for name in llama.buffers] == ["inv_freq", "inv_freq"]


def test_dtypes_come_from_the_headers(save: Callable[..., Path], tmp_path: Path) -> None:
    base = open_base(save(make_llama().bfloat16(), "base", tmp_path))
    folder = save(perturbed(make_llama(), 1), "expert", tmp_path)
    expert = open_expert(folder, base, "experts.x")
    name = base.weights[0]
    assert base.dtype(name) == base.read(name).dtype == DTYPES[base.info(name).dtype] == torch.bfloat16
    assert torch.equal(expert.delta(name), expert.read(name) - base.read(name).float())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 64}, "hidden_size 64, the base has 32"),
        ({"vocab_size": 300}, r"vocab_size 300, the base has 259; .* model.resize_token_embeddings\(259\)"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, the base has 2"),
        ({"intermediate_size": 64}, "intermediate_size 64, the base has 48"),
        ({"num_attention_heads": 2}, "num_attention_heads 2, the base has 4"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4, the base has 2"),
        (
            {"attention_bias": True},
            r"tensor model.layers.0.self_attn.\w+.bias has shape .*, the base has no such tensor",
        ),
    ],
    ids=str,
)
def test_another_size(
    changes: dict[str, Any], found: str, llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save(LlamaForCausalLM(llama_config(**changes)), "expert", tmp_path)
    with pytest.raises(InputError, match=found) as error:
        open_expert(folder, open_base(llamas["base"]), "experts.x")
    assert str(error.value).startswith("experts.x: ")
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("tokens", [250, 300])
def test_the_way_out_of_another_vocabulary(
    tokens: int, llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    save(LlamaForCausalLM(llama_config(vocab_size=tokens)), "expert", tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "expert")
    network.resize_token_embeddings(259)
    network.save_pretrained(tmp_path / "copy")
    assert open_expert(tmp_path / "copy", open_base(llamas["base"]), "experts.x").own


def test_another_architecture(llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(GPT2LMHeadModel(gpt2_config()), "expert", tmp_path)
    with pytest.raises(InputError, match=r"experts.x: .* has model_type 'gpt2', the base has 'llama'"):
        open_expert(folder, open_base(llamas["base"]), "experts.x")


BLOCK = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: {name: t[name] for name in t if name != BLOCK}, f"has no tensor for {BLOCK} of LlamaForCausalLM"),
        (
            lambda t: {name: t[name] for name in t if name != "model.norm.weight"},
            r"has no tensor for model.norm.weight",
        ),
        (lambda t: t | {f"{BLOCK}_scale": torch.ones(1)}, rf"tensor {BLOCK}_scale belongs to a quantised format"),
        (lambda t: t | {"model.layers.2.x": torch.ones(1)}, r"tensor model.layers.2.x has shape"),
        (lambda t: t | {"value_head.weight": torch.ones(1)}, r"tensor value_head.weight has shape"),
        (
            lambda t: t | {BLOCK: torch.ones(4, 32)},
            rf"tensor {BLOCK} has shape \(4, 32\), its config asks for \(32, 32\)",
        ),
        (
            lambda t: t | {"model.embed_tokens.weight": torch.ones(261, 32)},
            r"tensor model.embed_tokens.weight has shape \(261, 32\), its config asks for \(259, 32\)",
        ),
    ],
)
def test_missing_extra_and_misshapen_tensors(
    change: Any, found: str, llamas: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edit(save(make_llama(), "expert", tmp_path), change)
    with pytest.raises(InputError, match=found) as error:
        open_expert(folder, open_base(llamas["base"]), "experts.x")
    assert str(error.value).startswith("experts.x: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda t: {name: t[name] for name in t if "layer.1.output" not in name},
            "has no tensor for bert.encoder.layer.1.output",
        ),
        (
            lambda t: {name: t[name] for name in t if "word_embeddings" not in name},
            "has no tensor for bert.embeddings.word_emb",
        ),
        (
            lambda t: t | {"bert.embeddings.word_embeddings.weight": torch.ones(261, 32)},
            r"tensor bert.embeddings.word_embeddings.weight has shape \(261, 32\)",
        ),
        (lambda t: t | {"bert.encoder.layer.7.x": torch.ones(1)}, "tensor bert.encoder.layer.7.x has shape"),
    ],
)
def test_a_classifier_must_have_a_whole_trunk(change: Any, found: str, berts: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(berts["topic"], folder)
    edit(folder, change)
    with pytest.raises(InputError, match=f"experts.x: .*{found}"):
        open_expert(folder, open_base(berts["base"]), "experts.x")


def test_an_expert_without_the_head_of_its_base(save: Callable[..., Path], tmp_path: Path) -> None:
    base = open_base(save(BertForSequenceClassification(bert_config()), "base", tmp_path))
    folder = save(BertForSequenceClassification(bert_config()), "expert", tmp_path)
    edit(folder, lambda t: {name: t[name] for name in t if name != "classifier.bias"})
    with pytest.raises(InputError, match=r"has no tensor for classifier.bias of BertFor"):
        open_expert(folder, base, "experts.x")


def test_an_expert_that_is_only_a_trunk(save: Callable[..., Path], tmp_path: Path) -> None:
    """Its names lack the prefix that the base's have, and what the base has beside the trunk stays the base's."""
    trunk = make_bert_trunk()
    base = open_base(save(BertForPreTraining(bert_config()), "base", tmp_path))
    expert = open_expert(save(trunk, "expert", tmp_path), base, "experts.x")
    assert {name for name in base.weights if not expert.touches(name)} == {
        name for name in base.weights if name.startswith("cls.")
    }
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(expert.read(name), trunk.embeddings.word_embeddings.weight)
