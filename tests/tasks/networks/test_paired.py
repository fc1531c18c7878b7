from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sensmerge.tasks.networks.blocks import Shell, blocks_of
from sensmerge.tasks.networks.paired import Comparison, SeenBlock, layers_of, normalised
from sensmerge.tasks.networks.source import Source
from tests.conftest import make_llama, perturbed

Save = Callable[..., Path]
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8, 1]]), "labels": torch.tensor([1])}


def filled(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        parameter.data.normal_()
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_inputs(dtype: torch.dtype) -> None:
    inputs = torch.randn(2, 5, 8).to(dtype)
    wide = inputs.float()
    norms = {
        filled(nn.LayerNorm(8)): layer_norm(wide, (8,), eps=1e-5),
        filled(LlamaRMSNorm(8)): rms_norm(wide, (8,), eps=1e-6),
        filled(GemmaRMSNorm(8)): rms_norm(wide, (8,), eps=1e-6),
    }
    for norm, expected in norms.items():
        found = normalised(norm.to(dtype), inputs)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Cubed(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight**3


def test_a_norm_of_another_form_is_refused() -> None:
    assert normalised(filled(Cubed(8)), torch.randn(3, 8)) is None
    assert normalised(filled(nn.GroupNorm(2, 4)), torch.randn(3, 4, 8)) is None


class Read:
    """A classifier on a tiny Llama and the last block of it."""

    def __init__(self, save: Save, folder: Path) -> None:
        network = AutoModelForSequenceClassification.from_pretrained(save(make_llama(), "base", folder), num_labels=2)
        self.network: PreTrainedModel = perturbed(network, 1)
        expert = save(self.network, "expert", folder)
        self.source = Source(folder / "base", expert, "experts.a", "classification", torch.float32, "cpu")
        hollow = self.source.hollow()
        blocks = blocks_of(hollow)
        self.name, self.hollow = list(blocks.items())[-1]
        self.entry = Shell(self.source, hollow, blocks, {}).enter(BATCH)
        self.layers = layers_of(self.source, self.name, self.hollow)

    def block(self) -> SeenBlock:
        return SeenBlock(self.source, self.name, self.hollow, self.layers)

    @property
    def arguments(self) -> tuple[Tensor, object, object]:
        return self.entry.hidden, self.entry.calls[-1], self.entry.learned


def test_what_reaches_the_token_that_is_read(save: Save, tmp_path: Path) -> None:
    read = Read(save, tmp_path)
    block = read.block()
    last = torch.tensor([[False, False, False, False, True]])
    with torch.no_grad():
        expected = block.run(*read.arguments)
        found, matter = block.run_for(last, *read.arguments)
    assert torch.equal(found, expected)
    all_matter = {name for name, (one,) in matter.items() if one is not None and bool(one.all())}
    assert all_matter == {"input_layernorm", "self_attn.k_proj", "self_attn.v_proj"}
    assert all(torch.equal(one, last) for name, (one,) in matter.items() if name not in all_matter)
    assert all_matter < matter.keys() == read.layers.keys()


def test_layers_that_share_an_input_share_its_moments(save: Save, tmp_path: Path) -> None:
    read = Read(save, tmp_path)
    student, teacher = read.block(), read.block()
    comparison = Comparison(read.layers, student, 0.25)
    with torch.no_grad():
        for block in (student, teacher):
            block.run(*read.arguments)
    comparison.add(teacher)
    fit = comparison.fit(read.source.expert, "cpu")
    groups = {leader: set(one.layers) for leader, one in fit.linear.items()}
    assert groups == {
        "self_attn.q_proj": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        "self_attn.o_proj": {"self_attn.o_proj"},
        "mlp.gate_proj": {"mlp.gate_proj", "mlp.up_proj"},
        "mlp.down_proj": {"mlp.down_proj"},
    }
    assert fit.norms.keys() == {"input_layernorm", "post_attention_layernorm"}
    assert fit.apart == set()


def test_layers_with_other_tokens_are_left_apart(save: Save, tmp_path: Path) -> None:
    read = Read(save, tmp_path)
    student, teacher = read.block(), read.block()
    comparison = Comparison(read.layers, student, 0.25)
    with torch.no_grad():
        for block in (student, teacher):
            block.run(*read.arguments)
    teacher.inputs["mlp.down_proj"] = [one[:, 1:] for one in teacher.inputs["mlp.down_proj"]]
    comparison.add(teacher)
    fit = comparison.fit(read.source.expert, "cpu")
    anchors = {name: layer.read(read.source.expert, "cpu") for name, layer in read.layers.items()}
    assert fit.apart == {"mlp.down_proj"}
    assert fit.solve(anchors, 0.05).keys() == read.layers.keys() - {"mlp.down_proj"}
