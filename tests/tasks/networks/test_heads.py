from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DebertaV2Config,
    DebertaV2ForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    T5Config,
    T5ForTokenClassification,
)

from sensmerge.tasks.networks.heads import HEAD_WEIGHTS, DetachedHead, SavedHead
from sensmerge.tasks.networks.networks import trunk_of
from tests.census.networks import tiny_network
from tests.conftest import perturbed

PAD = 1
TEXT: dict[str, Any] = {"vocab_size": 40, "num_labels": 3, "pad_token_id": PAD}
SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CLASSIFIERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT, **SIZE)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT, **SIZE)),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**TEXT, **SIZE)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**TEXT, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
    ),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**TEXT, **SIZE)),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=4)),
}


TAGGERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForTokenClassification(BertConfig(**TEXT, **SIZE)),
    "roberta": lambda: RobertaForTokenClassification(RobertaConfig(**TEXT, **SIZE)),
    "deberta": lambda: DebertaV2ForTokenClassification(DebertaV2Config(**TEXT, **SIZE)),
    "llama": lambda: LlamaForTokenClassification(LlamaConfig(**TEXT, **SIZE)),
    "gpt2": lambda: GPT2ForTokenClassification(GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=4)),
    "t5": lambda: T5ForTokenClassification(T5Config(**TEXT, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)),
}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return perturbed(CLASSIFIERS[name]().eval(), 1, scale=0.1)


def make_tagger(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return perturbed(TAGGERS[name]().eval(), 1, scale=0.1)


def batch() -> dict[str, torch.Tensor]:
    """Three texts of different lengths, padded on the right."""
    ids = torch.randint(2, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((6, 2, 4)):
        ids[row, length:], mask[row, length:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_a_detached_head_gives_what_the_whole_network_gives(name: str) -> None:
    whole, inputs = make(name), batch()
    output = whole.base_model(**inputs)
    expected = whole(**inputs).logits
    head = DetachedHead(make(name))
    found = head.logits(output.last_hidden_state, getattr(output, "pooler_output", None), inputs)
    assert torch.equal(found, expected)
    assert len(expected.unique(dim=0)) == 3
    # Again, for some of the samples in another order.
    rows = [2, 0]
    pooled = getattr(output, "pooler_output", None)
    some = {key: values[rows] for key, values in inputs.items()}
    found = head.logits(output.last_hidden_state[rows], None if pooled is None else pooled[rows], some)
    torch.testing.assert_close(found, expected[rows])


@pytest.mark.parametrize("name", TAGGERS)
@torch.no_grad()
def test_a_detached_head_tags_tokens_as_the_whole_network_does(name: str) -> None:
    whole, inputs = make_tagger(name), batch()
    expected = whole(**inputs).logits
    output = trunk_of(whole)(**inputs)
    found = DetachedHead(make_tagger(name)).logits(output.last_hidden_state, None, inputs)
    assert found.shape == (3, 6, 3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_trunk_is_dropped(name: str) -> None:
    whole = make(name)
    left = {key for key, _ in DetachedHead(make(name)).network.named_parameters()}
    inside = {key for key, _ in whole.named_parameters() if key.startswith(f"{whole.base_model_prefix}.")}
    assert inside
    assert left == {key for key, _ in whole.named_parameters()} - inside


@torch.no_grad()
def test_logits_are_float32() -> None:
    head, hidden = DetachedHead(make("roberta").bfloat16()), torch.randn(3, 6, 16).bfloat16()
    assert head.logits(hidden, None, batch()).dtype == torch.float32


def test_a_saved_head_is_read_from_its_folder(tmp_path: Path) -> None:
    network = make("bert")
    tensors = {name: tensor.clone() for name, tensor in network.classifier.state_dict(prefix="classifier.").items()}
    save_file(tensors, tmp_path / HEAD_WEIGHTS)
    network.config.id2label = {0: "sad", 1: "so so", 2: "glad"}
    network.config.save_pretrained(tmp_path)
    saved = SavedHead(tmp_path)
    assert saved.config.num_labels == 3
    assert saved.config.id2label[2] == "glad"
    found = saved.head_tensors()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


def test_the_trunk_stays_as_it_is() -> None:
    network, inputs = make("bert"), batch()
    trunk = network.base_model
    before = trunk(**inputs).last_hidden_state
    DetachedHead(network)
    assert torch.equal(trunk(**inputs).last_hidden_state, before)


LANGUAGE_MODELS = {
    "OPTForCausalLM": "calls the decoder in its trunk",
    "FalconH1ForCausalLM": "reads a setting of its trunk",
    "MambaForCausalLM": "passes on the trunk's cache",
    "Llama4ForCausalLM": "names its trunk otherwise than `base_model_prefix`",
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_heads_of_language_models(name: str) -> None:
    network, ids = tiny_network(name), torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = network(**inputs, use_cache=False).logits
    hidden = trunk_of(network)(**inputs, use_cache=False).last_hidden_state
    found = DetachedHead(network).logits(hidden, None, inputs)
    assert torch.equal(found, expected)
