import pytest

from sensmerge.tasks.checkpoints.layers import (
    block_names,
    depths,
    depths_of_blocks,
    group_by_layer,
    in_block,
    layer_of,
)


@pytest.mark.parametrize(
    ("name", "layer", "block"),
    [
        # Llama
        ("model.embed_tokens.weight", "model.embed_tokens", False),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0", True),
        ("model.layers.11.input_layernorm.weight", "model.layers.11", True),
        ("model.norm.weight", "model.norm", False),
        ("lm_head.weight", "lm_head", False),
        # Mixtral: the number of an expert is no block of its own
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "model.layers.3", True),
        # GPT-2, as the hub has it and as transformers saves it
        ("wte.weight", "wte", False),
        ("h.0.attn.c_attn.bias", "h.0", True),
        ("transformer.wpe.weight", "transformer.wpe", False),
        ("transformer.h.10.mlp.c_fc.weight", "transformer.h.10", True),
        ("transformer.ln_f.bias", "transformer.ln_f", False),
        # BERT
        ("bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm", False),
        ("encoder.layer.1.attention.self.query.weight", "encoder.layer.1", True),
        ("bert.pooler.dense.bias", "bert.pooler.dense", False),
        ("classifier.weight", "classifier", False),
        # T5: sublayers of a block are numbered too
        ("shared.weight", "shared", False),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0", True),
        ("decoder.block.2.layer.0.SelfAttention.q.weight", "decoder.block.2", True),
        # ViT
        ("vit.embeddings.cls_token", "vit.embeddings", False),
        ("vit.encoder.layer.3.layernorm_before.bias", "vit.encoder.layer.3", True),
        # no dots; digits that are no component
        ("weight", "weight", False),
        ("0", "0", False),
        ("block1.conv2d.weight", "block1.conv2d", False),
    ],
)
def test_layer_of(name: str, layer: str, block: bool) -> None:
    assert layer_of(name) == layer
    assert in_block(name) is block


def test_group_by_layer_keeps_the_order() -> None:
    names = ["wte.weight", "h.1.ln.weight", "h.0.ln.weight", "h.1.ln.bias", "ln_f.weight", "ln_f.bias"]
    assert group_by_layer(names) == {
        "wte": ["wte.weight"],
        "h.1": ["h.1.ln.weight", "h.1.ln.bias"],
        "h.0": ["h.0.ln.weight"],
        "ln_f": ["ln_f.weight", "ln_f.bias"],
    }
    assert list(group_by_layer(names)) == ["wte", "h.1", "h.0", "ln_f"]


def test_blocks_in_order() -> None:
    names = [
        "embed.weight",
        "layers.0.a.weight",
        "layers.0.b.weight",
        "layers.10.a.weight",
        "layers.2.a.weight",
        "norm",
    ]
    assert block_names(names) == ["layers.0", "layers.10", "layers.2"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            ["model.embed_tokens", *(f"model.layers.{k}" for k in range(11)), "model.norm", "lm_head"],
            [0.0, *(k / 10 for k in range(11)), 1.0, 1.0],
        ),
        (
            ["embeddings.LayerNorm", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "pooler.dense"],
            [0.0, 0.0, 0.5, 1.0, 1.0],
        ),
        (["wte", "wpe", "h.0", "h.1", "ln_f"], [0.0, 0.0, 0.0, 1.0, 1.0]),
        # Each of several stacks by itself, and what lies beside its blocks with it
        (
            ["shared", "encoder.block.0", "encoder.block.1", "encoder.norm", "decoder.positions", "decoder.block.0"],
            [0.0, 0.0, 1.0, 1.0, 0.0, 1.0],
        ),
        (["embed", "layers.0", "head"], [0.0, 1.0, 1.0]),
        (["embed", "head"], []),
    ],
)
def test_depth_grows_from_the_first_block_to_the_last(layers: list[str], expected: list[float]) -> None:
    assert depths(layers) == dict(zip(layers, expected, strict=bool(expected)))


def test_depth_is_that_of_blocks_and_0_outside() -> None:
    layers = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    assert list(depths_of_blocks(layers).values()) == [0, 0, 0.5, 1, 0, 0]
    assert depths_of_blocks(["encoder", "head"]) == {"encoder": 0, "head": 0}
