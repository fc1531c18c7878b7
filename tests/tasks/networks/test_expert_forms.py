"""Experts that are saved in another form than their base: tied or not, stacked or not, inside another network."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    ResNetForImageClassification,
)

from sensmerge.tasks.checkpoints.checkpoint import WEIGHTS
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter import ADAPTER_WEIGHTS
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import Expert, load_network, open_expert
from tests.census.networks import tiny_network
from tests.conftest import bert_config, make_adapter, make_llama, perturbed

Save = Callable[..., Path]
IDS = torch.arange(3, 20)[None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def untied(seed: int, scale: float = 0.02) -> LlamaForCausalLM:
    """A fine-tune of the tied Llama that trained embedding and head apart."""
    network = make_llama(tie_word_embeddings=False)
    network.load_state_dict(make_llama().state_dict())
    return perturbed(network, seed, scale)


def with_head(folder: Path, head: torch.Tensor) -> Path:
    """Store a head beside the embedding that the config ties it to."""
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {HEAD: head.clone()}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def assert_is(expert: Expert, network: PreTrainedModel) -> None:
    """Assert that an expert's tensors, by the base's names, and its network are those of a network."""
    state = network.state_dict()
    for name in expert.base.weights:
        torch.testing.assert_close(expert.read(name), state[name], rtol=0, atol=1e-6)
    found = load_network(expert, "causal_lm", torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, network.eval()(IDS).logits, rtol=0, atol=1e-5)


def test_an_untied_expert_of_a_tied_base(llamas: dict[str, Path], save: Save, tmp_path: Path) -> None:
    network = untied(1)
    expert = open_expert(save(network, "a", tmp_path), open_base(llamas["base"]), "experts.a")
    assert expert.base.untied
    assert HEAD in expert.base.weights
    assert torch.equal(expert.base.read(HEAD), expert.base.read(EMBEDDING))
    assert_is(expert, network)
    assert "experts.a has its own values for both" in expert.notes[0]


def test_a_tied_expert_on_an_untied_base(llamas: dict[str, Path], save: Save, tmp_path: Path) -> None:
    """Its embedding is its head too, whether another expert or the base itself keeps them apart."""
    tied = open_expert(llamas["math"], open_base(llamas["base"]), "experts.math")
    base = open_expert(save(untied(1), "a", tmp_path), open_base(llamas["base"]), "experts.a").base
    other = open_base(save(untied(2), "base", tmp_path))
    for expert in (tied.on(base), open_expert(llamas["math"], other, "experts.math")):
        assert torch.equal(expert.read(HEAD), expert.read(EMBEDDING))
        assert torch.equal(expert.read(HEAD), load_file(llamas["math"] / WEIGHTS)[EMBEDDING])


@pytest.mark.parametrize("of", ["base", "expert"])
def test_files_that_hold_apart_what_the_config_ties(
    of: str, llamas: dict[str, Path], save: Save, tmp_path: Path
) -> None:
    head = torch.randn(259, 32, generator=torch.Generator().manual_seed(3))
    folder = with_head(save(make_llama(5), "model", tmp_path), head)
    reference = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(reference.lm_head.weight, head), "transformers keeps them apart"
    base = open_base(folder if of == "base" else llamas["base"])
    expert = open_expert(llamas["math"] if of == "base" else folder, base, "experts.a")
    assert expert.base.untied
    assert torch.equal((base if of == "base" else expert).read(HEAD), head)
    if of == "base":
        assert "are kept apart" in base.notes[0]
        network = load_network(base, "causal_lm", torch.float32, "cpu")
        assert torch.equal(network.lm_head.weight, head)


def test_a_head_stored_twice_is_one(llamas: dict[str, Path], save: Save, tmp_path: Path) -> None:
    folder = save(make_llama(5), "a", tmp_path)
    expert = open_expert(with_head(folder, load_file(folder / WEIGHTS)[EMBEDDING]), open_base(llamas["base"]), "a")
    assert not expert.base.untied
    same = make_llama(tie_word_embeddings=False)
    same.load_state_dict(make_llama(5).state_dict())
    assert not open_expert(save(same, "b", tmp_path), open_base(llamas["base"]), "b").base.untied


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_adapters_that_change_one_of_two_tied_parameters(
    settings: dict[str, object], llamas: dict[str, Path], tmp_path: Path
) -> None:
    """The right network is the one that was trained: peft's, with the adapter beside the weights."""
    make_adapter(make_llama(), tmp_path / "lora", 3, task_type="CAUSAL_LM", **settings)
    expert = open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")
    assert expert.base.untied
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llamas["base"]), tmp_path / "lora")
    network = load_network(expert, "causal_lm", torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(network(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_brings_another_base_layer(llamas: dict[str, Path], save: Save, tmp_path: Path) -> None:
    """peft loads what it finds; a copy that equals the base's counts for nothing."""
    base = save(make_llama(tie_word_embeddings=False), "base", tmp_path)
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    stored = load_file(tmp_path / "lora" / ADAPTER_WEIGHTS)
    name = f"base_model.model.{EMBEDDING.removesuffix('.weight')}.base_layer.weight"
    assert name in stored
    same = open_expert(tmp_path / "lora", open_base(base), "experts.x")
    assert not same.own
    save_file(stored | {name: stored[name] + 1}, tmp_path / "lora" / ADAPTER_WEIGHTS)
    expert = open_expert(tmp_path / "lora", open_base(base), "experts.x")
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora")
    merged = reference.merge_and_unload().state_dict()
    torch.testing.assert_close(expert.read(EMBEDDING), merged[EMBEDDING], rtol=1e-6, atol=1e-6)
    assert expert.factors(EMBEDDING) is None


def test_an_adapter_that_stores_embedding_and_head_untrained(llamas: dict[str, Path], tmp_path: Path) -> None:
    adapted = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "lora" / ADAPTER_WEIGHTS))
    expert = open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")
    assert not expert.own
    assert not expert.base.untied


@pytest.mark.parametrize("change", ["_orig_mod.{}", "module.{}", "default"])
def test_names_that_training_left_in_an_adapter(change: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(make_llama(), tmp_path / "lora", 3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = open_base(llamas["base"])
    name = "model.layers.0.self_attn.q_proj.weight"
    right = open_expert(tmp_path / "lora", base, "experts.x").delta(name)
    assert right.any()
    path = tmp_path / "lora" / ADAPTER_WEIGHTS
    tensors = load_file(path)
    for old in list(tensors):
        new = old.replace("_A.", "_A.default.").replace("_B.", "_B.default.") if change == "default" else None
        tensors[new or change.format(old)] = tensors.pop(old)
    save_file(tensors, path)
    assert torch.equal(open_expert(tmp_path / "lora", base, "experts.x").delta(name), right)


def test_names_that_training_left_in_a_checkpoint(llamas: dict[str, Path], save: Save, tmp_path: Path) -> None:
    folder = save(perturbed(make_llama(), 4), "a", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    found = open_expert(folder, open_base(llamas["base"]), "experts.a")
    assert all(torch.equal(found.read(name), tensors[name]) for name in found.base.weights)
    base = open_base(folder)
    assert set(base.weights) == set(open_base(llamas["base"]).weights), "merged models have the plain names"
    assert torch.equal(base.read("model.norm.weight"), tensors["model.norm.weight"])


def mixtral() -> MixtralForCausalLM:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=259, num_key_value_heads=2, num_local_experts=3, **size))


@pytest.mark.parametrize("stacked_base", [False, True])
def test_a_mixture_stacked_in_one_and_not_in_the_other(stacked_base: bool, tmp_path: Path) -> None:
    network = perturbed(mixtral(), 1)
    mixtral().save_pretrained(tmp_path / "base", save_original_format=not stacked_base)
    network.save_pretrained(tmp_path / "a", save_original_format=stacked_base)
    network.save_pretrained(tmp_path / "same", save_original_format=not stacked_base)
    base = open_base(tmp_path / "base")
    expert = open_expert(tmp_path / "a", base, "experts.a")
    same = open_expert(tmp_path / "same", base, "experts.a")
    assert expert.pieces
    assert not same.pieces
    for name in base.weights:
        assert torch.equal(expert.read(name), same.read(name))
        assert torch.equal(expert.delta(name), same.delta(name))


@pytest.mark.parametrize("stacked", [False, True])
def test_an_adapter_with_the_names_of_older_mixtures(stacked: bool, tmp_path: Path) -> None:
    """transformers 4 held a mixture's experts one by one, so adapters did too; peft loads them."""
    mixtral().save_pretrained(tmp_path / "base", save_original_format=not stacked)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for expert in range(3):
        for name, (rows, columns) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
            module = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(tmp_path / "base")
    config.save_pretrained(tmp_path / "lora")
    save_file(tensors, tmp_path / "lora" / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    reference = PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    merged = reference.merge_and_unload().state_dict()
    found = open_expert(tmp_path / "lora", open_base(tmp_path / "base"), "experts.x")
    network = load_network(found, "causal_lm", torch.float32, "cpu").state_dict()
    assert all(torch.allclose(network[name], merged[name], rtol=0, atol=1e-6) for name in merged)
    changed = {name for name, tensor in mixtral().state_dict().items() if not torch.equal(tensor, network[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"gate_up_proj", "down_proj"}


def gemma_config() -> Gemma3Config:
    text = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        text_config=text | heads,
        vision_config=vision | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=258,
        boi_token_index=257,
        eoi_token_index=256,
    )


def test_a_text_model_of_a_multimodal_base_and_the_other_way_round(tmp_path: Path) -> None:
    config = gemma_config()
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config)
    text = Gemma3ForCausalLM(config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    tuned = perturbed(copy.deepcopy(text), 1)
    wrapped = copy.deepcopy(whole)
    wrapped.model.language_model.load_state_dict(tuned.model.state_dict())
    for name, network in {"whole": whole, "text": text, "tuned": tuned, "wrapped": wrapped}.items():
        network.save_pretrained(tmp_path / name)
    inside = open_expert(tmp_path / "tuned", open_base(tmp_path / "whole"), "experts.a")
    same = open_expert(tmp_path / "wrapped", open_base(tmp_path / "whole"), "experts.a")
    assert all(torch.equal(inside.read(name), same.read(name)) for name in same.base.weights)
    outside = open_expert(tmp_path / "wrapped", open_base(tmp_path / "text"), "experts.a")
    same = open_expert(tmp_path / "tuned", open_base(tmp_path / "text"), "experts.a")
    assert all(torch.equal(outside.read(name), same.read(name)) for name in same.base.weights)
    assert "tensors of multi_modal_projector, vision_tower are left out" in outside.notes[0]


@pytest.mark.parametrize("trained_on", ["text", "whole"])
def test_adapters_across_towers(trained_on: str, tmp_path: Path) -> None:
    config = gemma_config()
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config)
    text = Gemma3ForCausalLM(config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    text.save_pretrained(tmp_path / "text")
    targets = r".*language_model.*\.q_proj" if trained_on == "whole" else ["q_proj"]
    network = whole if trained_on == "whole" else text
    make_adapter(network, tmp_path / "lora", 1, target_modules=targets, task_type="CAUSAL_LM")
    found = {}
    for name in ("text", "whole"):
        base = open_base(tmp_path / name)
        expert = open_expert(tmp_path / "lora", base, "experts.x")
        found[name] = {key.rpartition("layers.")[2]: expert.delta(key) for key in base.weights if expert.touches(key)}
    assert len(found["text"]) == 2
    assert found["text"].keys() == found["whole"].keys()
    assert all(torch.equal(found["text"][key], found["whole"][key]) for key in found["text"])


def test_a_head_of_the_task_is_not_the_base_head_of_the_same_name(tmp_path: Path) -> None:
    """ModernBERT's classifiers and its masked language model both have a `head.dense`."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ModernBertConfig(vocab_size=259, pad_token_id=2, **size)
    ModernBertForMaskedLM(config).save_pretrained(tmp_path / "base")
    ModernBertForSequenceClassification(config).save_pretrained(tmp_path / "a")
    expert = open_expert(tmp_path / "a", open_base(tmp_path / "base"), "experts.a")
    assert {"head.dense.weight", "head.norm.weight", "classifier.weight"} <= set(expert.head)
    assert not any(expert.touches(name) for name in expert.base.weights if name.startswith(("head.", "decoder.")))


def test_a_left_over_adapter_config(llamas: dict[str, Path], save: Save, tmp_path: Path) -> None:
    folder = save(perturbed(make_llama(), 4), "a", tmp_path)
    make_adapter(make_llama(), tmp_path / "lora", 3, target_modules=["q_proj"])
    (folder / "adapter_config.json").write_text((tmp_path / "lora" / "adapter_config.json").read_text())
    expert = open_expert(folder, open_base(llamas["base"]), "experts.a")
    assert not expert.is_adapter
    assert "adapter_config.json is ignored" in expert.notes[0]
    (folder / ADAPTER_WEIGHTS).write_bytes((tmp_path / "lora" / ADAPTER_WEIGHTS).read_bytes())
    with pytest.raises(
        InputError, match=r"experts.a: .* holds an adapter and a whole checkpoint; remove adapter_model"
    ):
        open_expert(folder, open_base(llamas["base"]), "experts.a")


def test_a_wrapper_that_contradicts_its_text_config(tmp_path: Path) -> None:
    """What the files hold decides, and both places of the config say so afterwards."""
    config = gemma_config()
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    stored = json.loads(path.read_text())
    stored["text_config"]["tie_word_embeddings"] = False
    path.write_text(json.dumps(stored))
    reference = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base")
    assert base.untied == (reference.lm_head.weight is not reference.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("network", "head"),
    [
        (BertForTokenClassification, {"classifier.weight", "classifier.bias"}),
        (BertForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
        (BertForNextSentencePrediction, {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}),
    ],
)
def test_heads_that_classify_no_texts_stay_with_their_expert(
    network: type[PreTrainedModel], head: set[str], berts: dict[str, Path], tmp_path: Path
) -> None:
    network(bert_config()).save_pretrained(tmp_path / "a")
    expert = open_expert(tmp_path / "a", open_base(berts["base"]), "experts.a")
    assert set(expert.head) - {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} == head
    assert expert.network == network.__name__


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "TOKEN_CLS"])
def test_what_an_adapter_ends_in(task_type: str | None, berts: dict[str, Path], tmp_path: Path) -> None:
    classifies = task_type != "TOKEN_CLS"
    network = (BertForSequenceClassification if classifies else BertForTokenClassification)(bert_config())
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": task_type}
    make_adapter(network, tmp_path / "lora", 1, **settings)
    expert = open_expert(tmp_path / "lora", open_base(berts["base"]), "experts.x")
    assert set(expert.head) == {"classifier.weight", "classifier.bias"}
    assert (expert.network == "BertForSequenceClassification") == classifies


def test_an_adapter_of_modules_that_match_patterns_of_older_names(tmp_path: Path) -> None:
    """Of Laguna's shared experts, an older name is a part of today's: `shared_expert.` of `shared_experts.`."""
    network = tiny_network("LagunaForCausalLM")
    network.save_pretrained(tmp_path / "base")
    targets = ["gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(copy.deepcopy(network), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    expert = open_expert(tmp_path / "lora", open_base(tmp_path / "base"), "experts.x")
    found = load_network(expert, "causal_lm", torch.float32, "cpu").state_dict()
    merged = adapted.merge_and_unload().state_dict()
    assert merged.keys() == found.keys()
    assert all(torch.allclose(found[name], merged[name], rtol=0, atol=1e-6) for name in merged)
    shared = "model.layers.1.mlp.shared_experts.up_proj.weight"
    assert not torch.equal(found[shared], network.state_dict()[shared])


def test_statistics_of_a_trunk_below_a_head(tmp_path: Path) -> None:
    """Running means lie in the trunk as its parameters do, though they are none."""
    trunk = tiny_network("ResNetModel")
    trunk.save_pretrained(tmp_path / "base")
    expert = ResNetForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
    for name, buffer in expert.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(1.0)
    expert.save_pretrained(tmp_path / "expert")
    base = open_base(tmp_path / "base")
    found = open_expert(tmp_path / "expert", base, "experts.x")
    assert found.own.keys() >= base.statistics
    assert all(bool((found.read(name) == 1).all()) for name in base.statistics if name.endswith("running_mean"))
    assert {name.partition(".")[0] for name in found.head} == {"classifier"}


def test_an_adapter_of_what_the_base_holds_fused(tmp_path: Path) -> None:
    network = tiny_network("HrmTextForCausalLM")
    network.save_pretrained(tmp_path / "base")
    make_adapter(network, tmp_path / "lora", 1, target_modules=["gate_proj"])
    with pytest.raises(InputError, match=r"gate_proj, whose weight the base's files hold in another form than HrmText"):
        open_expert(tmp_path / "lora", open_base(tmp_path / "base"), "experts.x")


@pytest.mark.parametrize("more", [{"target_modules": ["q_proj", "v_proj"]}, {"layers_to_transform": None}], ids=str)
def test_factors_that_peft_would_not_load(more: dict[str, object], llamas: dict[str, Path], tmp_path: Path) -> None:
    """A file that holds more than its config says: peft serves one expert, the file is another."""
    settings = {"target_modules": ["q_proj"], "layers_to_transform": [0], "task_type": "CAUSAL_LM"}
    make_adapter(make_llama(), tmp_path / "lora", 1, **settings)
    make_adapter(make_llama(), tmp_path / "more", 1, **settings | more)
    (tmp_path / "lora" / ADAPTER_WEIGHTS).write_bytes((tmp_path / "more" / ADAPTER_WEIGHTS).read_bytes())
    with pytest.raises(InputError, match=r"holds .*lora_[AB]\.weight and \d+ more, which peft ignores"):
        open_expert(tmp_path / "lora", open_base(llamas["base"]), "experts.x")


def test_a_dump_of_all_that_peft_wraps(save: Save, tmp_path: Path) -> None:
    """As `state_dict` has it: with the adapter's name, its wrapper, and the module as it was before."""
    base = save(make_llama(tie_word_embeddings=False), "base", tmp_path)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    make_adapter(make_llama(tie_word_embeddings=False), tmp_path / "lora", 1, **settings)
    right = open_expert(tmp_path / "lora", open_base(base), "experts.x")
    expected = {name: right.read(name) for name in right.base.weights}
    path = tmp_path / "lora" / ADAPTER_WEIGHTS
    tensors = {name.replace(".weight", ".math.weight"): one for name, one in load_file(path).items() if "lora_" in name}
    head = "base_model.model.lm_head"
    tensors[f"{head}.modules_to_save.math.weight"] = load_file(path)[f"{head}.weight"]
    tensors[f"{head}.original_module.weight"] = torch.zeros(259, 32)
    save_file(tensors, path)
    found = open_expert(tmp_path / "lora", open_base(base), "experts.x")
    assert all(torch.equal(found.read(name), expected[name]) for name in expected)
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first.replace(".math.", ".code."): tensors[first].clone()}, path)
    with pytest.raises(InputError, match=r"belong to two adapters; save one alone with peft's save_pretrained"):
        open_expert(tmp_path / "lora", open_base(base), "experts.x")
