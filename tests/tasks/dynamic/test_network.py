import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MPNetConfig,
    MPNetForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sensmerge.tasks.dynamic.network import DynamicNetwork, trunk_blocks, unlinear
from sensmerge.tasks.dynamic.vectors import Dense, LowRank, Vector, compact
from sensmerge.tasks.errors import InputError
from tests.conftest import perturbed

VOCABULARY, BLOCKS, EXPERTS, PAD = 40, 3, 3, 1

SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": PAD}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 0, "eos_token_id": None}
GPT2_SIZE: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": BLOCKS, "n_head": 4}
OPT_SIZE: dict[str, Any] = {
    **{"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 4},
    **{"max_position_embeddings": 32, "word_embed_proj_dim": 8},
}

NETWORKS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER, tie_word_embeddings=False)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZE, pad_token_id=PAD, bos_token_id=0, eos_token_id=None)),
    # Linear layers of a class of their own; positions that are numbered inside, and rows of all tokens.
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(**SIZE, vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=0, eos_token_id=None)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**OPT_SIZE, vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=0, eos_token_id=None)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT, num_labels=3)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=3)),
}
DECODERS = ("llama", "qwen2", "mistral", "gemma", "qwen3", "gpt2", "falcon", "opt")

Vectors = dict[str, dict[int, Vector]]


def make(name: str) -> PreTrainedModel:
    """A tiny network whose weights are large enough for every one of them to matter."""
    torch.manual_seed(0)
    return perturbed(NETWORKS[name]().eval(), seed=1, scale=0.15)


def dense(delta: Tensor) -> Vector:
    return Dense(delta)


def sparse(delta: Tensor) -> Vector:
    vector = compact(delta * (torch.rand(delta.shape) < 0.4), delta.dtype)
    return Dense(delta) if vector is None else vector


def low_rank(delta: Tensor) -> Vector:
    if delta.dim() != 2:
        return Dense(delta)
    rank = int(torch.randint(1, 4, ()))
    return LowRank(0.2 * torch.randn(rank, delta.shape[1]), 0.5 * torch.randn(delta.shape[0], rank))


FORMS: dict[str, list[Callable[[Tensor], Vector]]] = {
    "dense": [dense] * EXPERTS,
    "sparse": [sparse] * EXPERTS,
    "low-rank": [low_rank] * EXPERTS,
    "mixed": [dense, sparse, low_rank],
}


def make_vectors(network: PreTrainedModel, form: str) -> Vectors:
    """Task vectors of every parameter; in the mixed form, some experts leave some parameters alone."""
    torch.manual_seed(2)
    vectors: Vectors = {}
    for name, parameter in network.named_parameters():
        for expert, function in enumerate(FORMS[form]):
            vector = function(0.1 * torch.randn(parameter.shape))
            if form != "mixed" or torch.rand(()) < 0.8:
                vectors.setdefault(name, {})[expert] = vector
    return vectors


def materialised(network: PreTrainedModel, vectors: Vectors, coefficients: Tensor) -> PreTrainedModel:
    """A copy of the network with the weights base + Σ coefficient · task vector."""
    result = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            for expert, vector in vectors.get(name, {}).items():
                parameter += coefficients[expert] * vector.dense().float().to(parameter.dtype)
    return result


def make_inputs(name: str, side: str = "right") -> dict[str, Tensor]:
    """A batch of five samples of different lengths, or of five images."""
    torch.manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(5, 3, 8, 8)}
    lengths = (7, 3, 1, 6, 7)
    ids, mask = torch.full((5, 7), PAD), torch.zeros(5, 7, dtype=torch.int64)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(7 - length, 7)
        ids[row, place] = torch.randint(2, VOCABULARY, (length,))
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def alone(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch without its padding."""
    if "pixel_values" in inputs:
        return {"pixel_values": inputs["pixel_values"][row : row + 1]}
    kept = inputs["attention_mask"][row].bool()
    return {key: value[row : row + 1, kept] for key, value in inputs.items()}


def compare(logits: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Compare one sample's logits: (classes) or (tokens with padding on the right, vocabulary)."""
    assert torch.allclose(logits[: len(expected)], expected, rtol=0, atol=tolerance)


def scattered_coefficients() -> Tensor:
    """Samples that take no expert, one, or all; the first expert's are not next to each other."""
    return torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.3, -0.2, 0.9], [0, 1, 0], [0.5, 0.4, 0]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_equals_the_weights_of_every_sample(name: str, form: str) -> None:
    network = make(name)
    vectors, inputs = make_vectors(network, form), make_inputs(name)
    assert not unlinear(network, vectors)
    dynamic = DynamicNetwork(network, vectors, EXPERTS)
    base = network(**inputs).logits
    for coefficients in (torch.randn(5, EXPERTS), scattered_coefficients()):
        with dynamic.mixed(coefficients) as inside:
            logits = inside(**inputs).logits
        for row in range(5):
            expected = materialised(network, vectors, coefficients[row])(**alone(inputs, row)).logits[0]
            compare(logits[row], expected)
            if coefficients[row].any():
                assert (base[row, : len(expected)] - expected).abs().max() > 0.01
    assert torch.equal(network(**inputs).logits, base)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@torch.no_grad()
def test_alike_answers_any_number_of_samples_by_the_same_weights(name: str, form: str) -> None:
    network = make(name)
    vectors, inputs = make_vectors(network, form), make_inputs(name)
    dynamic, base, row = DynamicNetwork(network, vectors, EXPERTS), network(**inputs).logits, torch.randn(EXPERTS)
    expected = materialised(network, vectors, row)
    with dynamic.alike(row) as inside:
        for some in (inputs, alone(inputs, 3)):
            torch.testing.assert_close(inside(**some).logits, expected(**some).logits, rtol=0, atol=2e-5)
        with pytest.raises(AssertionError), dynamic.mixed(torch.ones(5, EXPERTS)):
            pass
    assert torch.equal(network(**inputs).logits, base)
    assert dynamic.writes_out(10**6) == (form in ("dense", "sparse"))
    assert not dynamic.writes_out(10)


@pytest.mark.parametrize("name", NETWORKS)
def test_works_with_gradients_enabled(name: str) -> None:
    network, inputs, coefficients = make(name), make_inputs(name), scattered_coefficients()
    dynamic = DynamicNetwork(network, make_vectors(network, "mixed"), EXPERTS)
    with dynamic.mixed(coefficients):
        with torch.inference_mode():
            expected = network(**inputs).logits
        logits = network(**inputs).logits
        logits.sum().backward()
    assert torch.allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
@torch.inference_mode()
def test_bfloat16_is_as_near_as_materialised_weights(name: str) -> None:
    network, inputs, coefficients = make(name), make_inputs(name), 0.5 * torch.randn(5, EXPERTS)
    vectors = make_vectors(network, "mixed")
    halved = copy.deepcopy(network).to(torch.bfloat16)
    half_vectors = {
        parameter: {expert: vector.to("cpu", torch.bfloat16) for expert, vector in by_expert.items()}
        for parameter, by_expert in vectors.items()
    }
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with DynamicNetwork(halved, half_vectors, EXPERTS).mixed(coefficients):
        logits = halved(**inputs).logits
    assert logits.dtype == torch.bfloat16
    errors, usual = [], []
    for row in range(5):
        one = alone(inputs, row)
        single = {key: value.float() if value.is_floating_point() else value for key, value in one.items()}
        exact = materialised(network, vectors, coefficients[row])(**single).logits[0]
        rounded = materialised(halved, half_vectors, coefficients[row])(**one).logits[0]
        errors.append((logits[row].float()[: len(exact)] - exact).abs().max())
        usual.append((rounded.float() - exact).abs().max())
    assert max(errors) < 2 * max(usual)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "roberta", "vit"])
@torch.inference_mode()
def test_a_batch_equals_its_samples_one_by_one(name: str) -> None:
    network, inputs, coefficients = make(name), make_inputs(name), torch.randn(5, EXPERTS)
    dynamic = DynamicNetwork(network, make_vectors(network, "mixed"), EXPERTS)
    with dynamic.mixed(coefficients):
        logits = network(**inputs).logits
    for row in range(5):
        with dynamic.mixed(coefficients[row : row + 1]):
            compare(logits[row], network(**alone(inputs, row)).logits[0])


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_one_hot_rows_are_experts_and_zero_rows_the_base(form: str) -> None:
    network, inputs = make("bert"), make_inputs("bert")
    vectors = make_vectors(network, form)
    dynamic = DynamicNetwork(network, vectors, EXPERTS)
    base = network(**inputs).logits
    with dynamic.mixed(torch.zeros(5, EXPERTS)):
        assert torch.equal(network(**inputs).logits, base)
    for expert, row in enumerate(torch.eye(EXPERTS)):
        with dynamic.mixed(row.repeat(5, 1)):
            logits = network(**inputs).logits
        assert torch.allclose(logits, materialised(network, vectors, row)(**inputs).logits, atol=1e-5), expert
    # The base and all experts on one sample, as the router's probes are.
    probes = torch.cat([torch.zeros(1, EXPERTS), torch.eye(EXPERTS)])
    repeated = {key: value[:1].repeat(1 + EXPERTS, 1) for key, value in inputs.items()}
    with dynamic.mixed(probes):
        logits = network(**repeated).logits
    for row in range(1 + EXPERTS):
        expected = materialised(network, vectors, probes[row])(**alone(inputs, 0)).logits[0]
        assert torch.allclose(logits[row], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma", "bert"])
@torch.inference_mode()
def test_the_order_of_experts_does_not_matter(name: str) -> None:
    network, inputs, coefficients = make(name), make_inputs(name), torch.randn(5, EXPERTS)
    vectors = make_vectors(network, "mixed")
    order = [2, 0, 1]
    permuted = {
        parameter: {place: by_expert[expert] for place, expert in enumerate(order) if expert in by_expert}
        for parameter, by_expert in vectors.items()
    }
    with DynamicNetwork(network, vectors, EXPERTS).mixed(coefficients):
        logits = network(**inputs).logits
    with DynamicNetwork(network, permuted, EXPERTS).mixed(coefficients[:, order]):
        assert torch.allclose(network(**inputs).logits, logits, atol=1e-5)


@torch.inference_mode()
def test_a_single_expert() -> None:
    network, inputs = make("llama"), make_inputs("llama")
    vectors = {name: {0: vector[0]} for name, vector in make_vectors(network, "dense").items()}
    coefficients = torch.rand(5, 1)
    with DynamicNetwork(network, vectors, 1).mixed(coefficients):
        logits = network(**inputs).logits
    for row in range(5):
        compare(logits[row], materialised(network, vectors, coefficients[row])(**alone(inputs, row)).logits[0])


@pytest.mark.parametrize("form", ["dense", "mixed"])
@pytest.mark.parametrize("name", DECODERS)
@torch.inference_mode()
def test_generation_equals_that_of_the_materialised_networks(name: str, form: str) -> None:
    network, inputs, coefficients = make(name), make_inputs(name, side="left"), torch.randn(5, EXPERTS)
    vectors = make_vectors(network, form)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    with DynamicNetwork(network, vectors, EXPERTS).mixed(coefficients) as inside:
        tokens = inside.generate(**inputs, **options)[:, 7:]
    for row in range(5):
        one = alone(inputs, row)
        expected = materialised(network, vectors, coefficients[row]).generate(**one, **options)
        assert tokens[row].tolist() == expected[0, one["input_ids"].shape[1] :].tolist()
    assert len(set(map(tuple, tokens.tolist()))) > 1


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_hidden_states_are_those_of_the_materialised_networks(name: str) -> None:
    network, inputs, coefficients = make(name), make_inputs(name), torch.randn(5, EXPERTS)
    vectors = make_vectors(network, "mixed")
    dynamic = DynamicNetwork(network, vectors, EXPERTS)
    assert dynamic.blocks == BLOCKS
    # What decoders return for the last block is normalised.
    layers = [2, 1] if name in (*DECODERS, "vit") else [3, 1, 2]
    found = dynamic.hidden_states(inputs, coefficients, layers)
    assert list(found) == layers
    for row in range(5):
        one = materialised(network, vectors, coefficients[row])
        expected = one(**alone(inputs, row), output_hidden_states=True).hidden_states
        for layer in layers:
            assert found[layer].shape[0] == 5
            compare(found[layer][row], expected[layer][0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "vit"])
@torch.inference_mode()
def test_blocks_after_the_last_layer_do_not_run(name: str) -> None:
    network, inputs = make(name), make_inputs(name)
    dynamic = DynamicNetwork(network, make_vectors(network, "dense"), EXPERTS)
    blocks = next(module for module in network.modules() if isinstance(module, nn.ModuleList))
    assert len(blocks) == BLOCKS
    calls: list[int] = []
    for number, block in enumerate(blocks, start=1):
        block.register_forward_pre_hook(lambda module, args, number=number: calls.append(number))
    dynamic.hidden_states(inputs, torch.randn(5, EXPERTS), [2, 1])
    assert calls == [1, 2]
    dynamic.hidden_states(inputs, torch.zeros(5, EXPERTS), [3])
    assert calls == [1, 2, 1, 2, 3]
    with dynamic.mixed(torch.randn(5, EXPERTS)):
        network(**inputs)
    assert calls == [1, 2, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("layer", [0, BLOCKS + 1, -1])
def test_a_layer_that_does_not_exist(layer: int) -> None:
    dynamic = DynamicNetwork(make("bert"), {}, EXPERTS)
    with pytest.raises(InputError, match=rf"layer is {layer}; the model has 3 blocks, 1 to 3"):
        dynamic.hidden_states(make_inputs("bert"), torch.zeros(5, EXPERTS), [1, layer])


def hooked(network: nn.Module) -> set[str]:
    """The modules that have any hook."""
    return {name for name, module in network.named_modules() if module._forward_hooks or module._forward_pre_hooks}


@torch.inference_mode()
def test_only_what_the_experts_change_is_hooked() -> None:
    network, inputs = make("llama"), make_inputs("llama")
    every = make_vectors(network, "dense")
    block = "model.layers.1."
    vectors: Vectors = {
        f"{block}mlp.up_proj.weight": {0: every[f"{block}mlp.up_proj.weight"][0]},
        f"{block}input_layernorm.weight": {1: every[f"{block}input_layernorm.weight"][1]},
        "model.embed_tokens.weight": {1: every["model.embed_tokens.weight"][1]},
    }
    dynamic = DynamicNetwork(network, vectors, EXPERTS)
    assert not hooked(network)
    tied = {"model.embed_tokens", "lm_head"}
    for coefficients, expected in (
        (torch.ones(5, 3), {f"{block}mlp.up_proj", f"{block}input_layernorm", *tied}),
        (torch.tensor([[1.0, 0, 1]] * 5), {f"{block}mlp.up_proj"}),
        (torch.tensor([[0.0, 0, 1]] * 5), set()),
        (torch.zeros(5, 3), set()),
    ):
        with dynamic.mixed(coefficients):
            network(**inputs)
            assert hooked(network) == (expected | {"", "model"} if expected else set())
        assert not hooked(network)


@pytest.mark.parametrize("name", ["gemma", "vit"])
@torch.inference_mode()
def test_everything_is_put_back_after_an_exception(name: str) -> None:
    network, inputs = make(name), make_inputs(name)
    before = dict(network.named_parameters())
    base = network(**inputs).logits
    dynamic = DynamicNetwork(network, make_vectors(network, "dense"), EXPERTS)

    def fail(module: nn.Module, args: object, output: object) -> None:
        raise KeyboardInterrupt

    # In the middle of the network, right behind parameters that have been replaced.
    module = next(module for module in network.modules() if type(module).__name__.endswith(("RMSNorm", "Embeddings")))
    handle = module.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), dynamic.mixed(torch.randn(5, EXPERTS)):
        network(**inputs)
    handle.remove()
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[parameter] is before[parameter] for parameter in before)
    assert not hooked(network)
    assert torch.equal(network(**inputs).logits, base)
    with dynamic.mixed(torch.zeros(5, EXPERTS)):
        assert torch.equal(network(**inputs).logits, base)


def qwen2_moe() -> PreTrainedModel:
    config = Qwen2MoeConfig(
        **DECODER, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    torch.manual_seed(0)
    return perturbed(Qwen2MoeForCausalLM(config).eval(), seed=1, scale=0.15)


@torch.inference_mode()
def test_rows_of_all_tokens_have_their_sample() -> None:
    network, inputs, coefficients = qwen2_moe(), make_inputs("llama"), torch.randn(5, EXPERTS)
    shared = {name: by for name, by in make_vectors(network, "mixed").items() if ".shared_expert." in name}
    assert len(shared) == 3 * BLOCKS
    seen: list[tuple[int, ...]] = []
    shared_expert: Any = network.base_model.layers[0].mlp.shared_expert
    shared_expert.up_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with DynamicNetwork(network, shared, EXPERTS).mixed(coefficients):
        logits = network(**inputs).logits
    assert seen == [(35, 16)]
    for row in range(5):
        compare(logits[row], materialised(network, shared, coefficients[row])(**alone(inputs, row)).logits[0])


@torch.inference_mode()
def test_rows_that_lost_their_sample_are_an_error() -> None:
    network = make("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    dynamic = DynamicNetwork(network, {name: {0: Dense(torch.randn(network.get_parameter(name).shape))}}, 1)
    message = (
        r"model\.layers\.0\.mlp\.up_proj \(Linear\) got a tensor of shape \(7, 16\) for 5 samples.*"
        r"use application: \{kind: static\}"
    )
    with dynamic.mixed(torch.ones(5, 1)):
        network(**make_inputs("llama"))
        with pytest.raises(InputError, match=message):  # some of the 35 rows, as an expert of a mixture gets them
            network.get_submodule("model.layers.0.mlp.up_proj")(torch.randn(7, 16))


WRITTEN: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=2)),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=BLOCKS, state_size=4, time_step_rank=2)
    ),
}


def make_written(name: str) -> tuple[PreTrainedModel, Vectors, DynamicNetwork]:
    """A network that has parameters without a linear form, with task vectors of all."""
    torch.manual_seed(0)
    with torch.inference_mode(False):  # as networks are loaded
        network = perturbed(WRITTEN[name]().eval(), seed=1, scale=0.15)
    vectors = make_vectors(network, "mixed")
    written = unlinear(network, vectors)
    assert written
    assert written < vectors.keys()
    return network, vectors, DynamicNetwork(network, vectors, EXPERTS, written)


@pytest.mark.parametrize("name", WRITTEN)
@torch.inference_mode()
def test_samples_with_the_same_coefficients_run_together(name: str) -> None:
    network, vectors, dynamic = make_written(name)
    coefficients = torch.tensor([[1.0, 0, 0], [0.3, -0.2, 0.9], [1.0, 0, 0], [0, 0, 0], [0.3, -0.2, 0.9]])
    groups = dynamic.together(coefficients)
    assert groups == [[0, 2], [1, 4], [3]]
    inputs, before = make_inputs("llama"), {key: value.clone() for key, value in network.state_dict().items()}
    for rows in groups:
        own = {key: value[rows] for key, value in inputs.items()}
        row = coefficients[rows[0]]
        with dynamic.mixed(coefficients[rows]):
            logits = network(**own).logits
        for place in range(len(rows)):
            compare(logits[place], materialised(network, vectors, row)(**alone(own, place)).logits[0])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    with pytest.raises(AssertionError, match="one group of samples at a time"), dynamic.mixed(coefficients):
        pass
    found = dynamic.hidden_states(inputs, coefficients, [2, 1])
    for row in range(5):
        one = materialised(network, vectors, coefficients[row])
        shift = 1 if name == "mamba" else 0  # its first hidden states are those behind the first block
        expected = one(**alone(inputs, row), output_hidden_states=True).hidden_states
        for layer in (1, 2):
            compare(found[layer][row], expected[layer - shift][0])


@torch.inference_mode()
def test_only_experts_that_change_what_is_written_out_part_a_batch() -> None:
    network, vectors, _ = make_written("mixtral")
    written = unlinear(network, vectors)
    first = {name: {0: by_expert[0]} for name, by_expert in vectors.items() if name in written and 0 in by_expert}
    others = {name: by_expert for name, by_expert in vectors.items() if name not in written}
    dynamic = DynamicNetwork(network, others | first, EXPERTS, written)
    coefficients = torch.tensor([[1.0, 0, 2], [1.0, 3, 0], [0, 5, 0]])
    assert dynamic.together(coefficients) == [[0, 1], [2]]
    # A whole batch that nothing has to be written out for: the adapters of attention layers alone.
    assert DynamicNetwork(network, others, EXPERTS, written).together(coefficients) == [[0, 1, 2]]


@torch.inference_mode()
def test_more_or_fewer_samples_than_coefficients_are_an_error() -> None:
    network, inputs = make("bert"), make_inputs("bert")
    dynamic = DynamicNetwork(network, make_vectors(network, "dense"), EXPERTS)
    for size in (1, 4):
        with pytest.raises(InputError, match=rf"for {size} samples"), dynamic.mixed(torch.ones(size, EXPERTS)):
            network(**inputs)


def meta_mamba() -> PreTrainedModel:
    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2)
    )


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=2)),
            {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"},
        ),
        (
            meta_mamba,
            # On a GPU, Mamba multiplies with weights of modules that it does not call.
            {f"mixer.{name}" for name in ("A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias")}
            | {f"mixer.{name}.weight" for name in ("dt_proj", "x_proj", "out_proj")},
        ),
        (lambda: MPNetForSequenceClassification(MPNetConfig(**TEXT)), {"mpnet.encoder.relative_attention_bias.weight"}),
    ],
)
def test_what_has_no_linear_form_is_found(build: Callable[[], PreTrainedModel], expected: set[str]) -> None:
    with torch.device("meta"):
        network = build()
    found = unlinear(network, [name for name, _ in network.named_parameters()])
    assert {name.partition(".layers.")[2].partition(".")[2] or name for name in found} == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_has_a_linear_form_in_usual_networks(name: str) -> None:
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert not unlinear(network, [parameter for parameter, _ in network.named_parameters()])
    assert len(trunk_blocks(network)) == BLOCKS


def test_blocks_are_those_that_text_goes_through() -> None:
    vision = {"num_hidden_layers": 5, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Gemma3Config(text_config={**DECODER}, vision_config={**vision, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        network = Gemma3ForConditionalGeneration(config)
    assert trunk_blocks(network) == [f"language_model.layers.{number}" for number in range(BLOCKS)]
