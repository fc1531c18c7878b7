from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.blocks import Part, Shell, blocks_of
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.statistics.sensitivity import Sensitivity
from tests.conftest import make_llama, perturbed

Save = Callable[..., Path]
IDS = torch.tensor([[5, 6, 7, 8]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}

STATISTICS = {"sensitivity": Sensitivity()}


def source(base: Path, expert: Path) -> Source:
    return Source(base, expert, "experts.math", "causal_lm", torch.float32, "cpu")


def test_parts_make_the_whole(llamas: dict[str, Path]) -> None:
    one = source(llamas["base"], llamas["math"])
    network = one.hollow()
    blocks = blocks_of(network)
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    shell = Shell(one, network, blocks, STATISTICS)
    hidden, calls, learned = shell.enter(BATCH)
    assert not learned
    part = Part(one, blocks, STATISTICS)
    behind, _ = part.forward(hidden, calls, learned)
    whole = AutoModelForCausalLM.from_pretrained(llamas["math"])
    output = whole(**BATCH, output_hidden_states=True)
    assert torch.equal(shell.trunk({**BATCH}, behind)["hidden"], output.hidden_states[-1])
    loss, gradient, _ = shell.loss(BATCH, behind)
    assert loss == float(output.loss.detach())
    output.loss.backward()
    before, sums, _ = part.backward(hidden, calls, learned, gradient)
    assert before.shape == hidden.shape
    expected = {
        f"model.layers.{i}": float(sum((p.detach() * p.grad).abs().sum() for p in layer.parameters()))
        for i, layer in enumerate(whole.model.layers)
    }
    assert sums["sensitivity"] == pytest.approx(expected, rel=1e-5)
    tied = whole.lm_head.weight
    assert shell.backward(BATCH, behind, before, [])["sensitivity"]["model.embed_tokens"] == pytest.approx(
        float((tied.detach() * tied.grad).abs().sum()), rel=1e-5
    )


def test_hollow_blocks_stay_hollow(llamas: dict[str, Path]) -> None:
    one = source(llamas["base"], llamas["math"])
    blocks = blocks_of(one.hollow())
    Part(one, blocks, STATISTICS)
    assert {parameter.device.type for block in blocks.values() for parameter in block.parameters()} == {"meta"}


def test_what_blocks_are_given_may_be_learned(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here positions that depend on the embedding, which has gradients by way of all blocks."""
    rotary = LlamaRotaryEmbedding.forward

    def learned(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return tuple(each * 30 * x.abs().mean() for each in rotary(self, x, *args, **kwargs))

    def sums(placement: Placement) -> dict[str, float]:
        with open_runner(source(llamas["base"], llamas["math"]), placement, tmp_path, STATISTICS) as runner:
            return next(iter(runner.run([BATCH], lambda *_: None)))[1].sums["sensitivity"]

    plain = sums("whole")["model.embed_tokens"]
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", learned)
    whole = sums("whole")
    assert whole["model.embed_tokens"] != pytest.approx(plain, rel=1e-3)
    assert sums("streamed") == pytest.approx(whole, rel=1e-5)


def test_blocks_that_share_weights(llamas: dict[str, Path]) -> None:
    network = source(llamas["base"], llamas["math"]).hollow()
    network.model.layers[1].mlp = network.model.layers[0].mlp
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no blocks that share no weights, .* placement: whole"):
        blocks_of(network)


def test_missing_weights(save: Save, tmp_path: Path) -> None:
    base = save(LlamaModel(make_llama(tie_word_embeddings=False).config), "base", tmp_path)
    expert = save(perturbed(make_llama(tie_word_embeddings=False), 1).model, "expert", tmp_path)
    one = source(base, expert)
    network = one.hollow()
    with pytest.raises(InputError, match=r"base: no fitting weights for lm_head\.weight of LlamaForCausalLM"):
        Shell(one, network, blocks_of(network), {})
