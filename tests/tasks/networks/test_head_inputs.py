import pytest
import torch
from transformers import ModernBertConfig, ModernBertForSequenceClassification, RobertaForSequenceClassification

from sensmerge.tasks.networks.blocks import trunk_output
from sensmerge.tasks.networks.head_inputs import head_input, is_little, logits_of
from sensmerge.tasks.networks.heads import DetachedHead
from tests.conftest import perturbed
from tests.tasks.networks.test_heads import CLASSIFIERS, SIZE, TEXT, batch, make


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_another_head_gives_the_same_logits_of_what_one_reads(name: str) -> None:
    whole, inputs = make(name), batch()
    with torch.no_grad():
        output = trunk_output(whole.base_model(**inputs))
    kept = head_input(DetachedHead(make(name)), output, inputs)
    assert len(kept["hidden"]) == len(kept["places"]) == (0 if name == "bert" else 3)
    assert is_little(kept, inputs)
    changed = DetachedHead(perturbed(make(name), 7, scale=0.5))
    with torch.no_grad():
        expected = changed.logits(output["hidden"], output.get("pooled"), inputs)
    assert torch.equal(logits_of(changed, kept, inputs), expected)
    assert not torch.allclose(expected, logits_of(DetachedHead(make(name)), kept, inputs))


def test_a_head_whose_units_are_all_off() -> None:
    network, inputs = make("roberta"), batch()
    assert isinstance(network, RobertaForSequenceClassification)
    with torch.no_grad():
        network.classifier.out_proj.weight.zero_()
        output = trunk_output(network.base_model(**inputs))
    kept = head_input(DetachedHead(network), output, inputs)
    assert len(kept["places"]) == inputs["input_ids"].numel()
    other = DetachedHead(make("roberta"))
    with torch.no_grad():
        expected = other.logits(output["hidden"], None, inputs)
    assert torch.equal(logits_of(other, kept, inputs), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_what_is_read_is_said_by_the_config(pooling: str) -> None:
    torch.manual_seed(0)
    config = ModernBertConfig(**TEXT, **SIZE, classifier_pooling=pooling, cls_token_id=2, sep_token_id=3)
    network, inputs = perturbed(ModernBertForSequenceClassification(config).eval(), 1, scale=0.1), batch()
    with torch.no_grad():
        output, expected = trunk_output(network.base_model(**inputs)), network(**inputs).logits
    head = DetachedHead(network)
    kept = head_input(head, output, inputs)
    assert is_little(kept, inputs) == (pooling == "cls")
    assert torch.equal(logits_of(head, kept, inputs), expected)
