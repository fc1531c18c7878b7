from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from sensmerge.tasks.checkpoints.checkpoint import WEIGHTS
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import open_base
from tests.conftest import bert_config, make_bert_trunk, make_llama

Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj.weight"


def saved(network: PreTrainedModel, folder: Path, change: Callable[[Tensors], Tensors], **options: object) -> Path:
    """Save a network with other tensors."""
    network.save_pretrained(folder, **options)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def mixtral() -> MixtralForCausalLM:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=3, **size))


def test_two_spellings_of_one_parameter(tmp_path: Path) -> None:
    old, new = "embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"
    equal = saved(make_bert_trunk(), tmp_path / "equal", lambda t: t | {old: t[new].clone()})
    assert len(open_base(equal).weights) == len(load_file(equal / WEIGHTS)) - 1
    apart = saved(make_bert_trunk(), tmp_path / "apart", lambda t: t | {old: t[new] + 1})
    with pytest.raises(InputError, match=r"LayerNorm.(gamma|weight) and .* two spellings of one parameter") as error:
        open_base(apart)
    assert str(apart) in str(error.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: {name: t[name] for name in t if name != "lm_head.weight"}, "has no tensor for lm_head.weight of Ll"),
        (lambda t: t | {Q: t[Q].to(torch.int8)}, f"tensor {Q} is I8, but LlamaForCausalLM has a float parameter"),
        (lambda t: t | {f"{Q}_scale": torch.ones(1)}, f"{Q}_scale belongs to a quantised format"),
        (lambda t: t | {Q.replace("weight", "qweight"): torch.ones(1)}, "qweight belongs to a quantised format"),
        (lambda t: t | {Q.replace("weight", "SCB"): torch.ones(1)}, "SCB belongs to a quantised format"),
        (lambda t: t | {Q: t[Q][:4].clone()}, r"q_proj.weight has shape \(4, 32\), its config asks for \(32, 32\)"),
    ],
)
def test_a_parameter_without_its_tensor(change: Callable[[Tensors], Tensors], found: str, tmp_path: Path) -> None:
    folder = saved(make_llama(tie_word_embeddings=False), tmp_path / "base", change)
    with pytest.raises(InputError, match=found) as error:
        open_base(folder)
    assert "\n" not in str(error.value)


def test_a_trunk_may_lack_its_pooler(tmp_path: Path) -> None:
    network = BertModel(bert_config(), add_pooling_layer=False)
    network.save_pretrained(tmp_path / "base")
    assert len(open_base(tmp_path / "base").weights) == len(list(network.parameters()))


def test_a_trunk_without_a_block_is_not_whole(tmp_path: Path) -> None:
    config: BertConfig = bert_config()
    folder = saved(BertModel(config), tmp_path / "base", lambda t: {n: t[n] for n in t if "layer.1." not in n})
    with pytest.raises(InputError, match=r"has no tensor for encoder.layer.1.attention"):
        open_base(folder)


@pytest.mark.parametrize("stacked", [False, True])
def test_mixtures_in_both_layouts(stacked: bool, tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base", save_original_format=not stacked)
    assert any(name.endswith("experts.2.w3.weight") for name in open_base(tmp_path / "base").weights) != stacked


def test_a_mixture_that_lacks_an_expert(tmp_path: Path) -> None:
    folder = saved(mixtral(), tmp_path / "base", lambda t: {n: t[n] for n in t if "experts.1.w3" not in n})
    with pytest.raises(InputError, match=r"has no tensor for layers.0.mlp.experts.1.w3.weight, a part of Mixtral"):
        open_base(folder)


def test_a_mixture_in_two_forms_at_once(tmp_path: Path) -> None:
    down = mixtral().model.layers[0].mlp.experts.down_proj.detach().clone()
    folder = saved(mixtral(), tmp_path / "base", lambda t: t | {"model.layers.0.mlp.experts.down_proj": down})
    with pytest.raises(InputError, match=r"model.layers.0.mlp.experts.down_proj in two forms, as model.*and as model"):
        open_base(folder)


@pytest.mark.parametrize("place", ["", "text_config."])
def test_quantised_weights_are_named(place: str, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    entry = '"quantization_config": {"quant_method": "gptq"}'
    inside = f'"text_config": {{{entry}}}' if place else entry
    config.write_text(config.read_text().replace("{", f"{{{inside},", 1))
    with pytest.raises(InputError, match=rf"quantised \({place}quantization_config\)"):
        open_base(tmp_path / "base")
