import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from sensmerge.tasks.checkpoints.checkpoint import WEIGHTS
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.classes import class_names, class_order, in_order, parameters_of_classes
from sensmerge.tasks.networks.expert import load_network, open_expert
from tests.conftest import bert_config, perturbed

Save = Callable[..., Path]
IDS = torch.arange(3, 20)[None]
OURS, THEIRS = ["joy", "anger", "fear", "calm"], ["fear", "calm", "joy", "anger"]
ORDER = [2, 3, 0, 1]


def named(config: PretrainedConfig, names: list[str]) -> PretrainedConfig:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return config


def roberta(names: list[str]) -> RobertaForSequenceClassification:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = named(RobertaConfig(vocab_size=259, max_position_embeddings=128, **size), names)
    torch.manual_seed(0)
    return RobertaForSequenceClassification(config)


def with_names(network: PreTrainedModel, names: list[str]) -> PreTrainedModel:
    other = copy.deepcopy(network)
    named(other.config, names)
    return other


def test_names_of_classes() -> None:
    assert class_names(named(bert_config(), OURS)) == OURS
    assert class_names(bert_config(3)) is None
    assert class_names(named(bert_config(), ["joy", "LABEL_1"])) is None
    assert class_names(named(bert_config(), ["joy", "joy"])) is None


@pytest.mark.parametrize(
    ("theirs", "ours", "order"),
    [
        (THEIRS, OURS, ORDER),
        (OURS, OURS, [0, 1, 2, 3]),
        (["a", "b", "c", "d"], OURS, None),
        (OURS[:3], OURS, None),
        ([f"LABEL_{number}" for number in range(4)], OURS, [0, 1, 2, 3]),
        (THEIRS, [f"LABEL_{number}" for number in range(4)], [0, 1, 2, 3]),
    ],
)
def test_order_of_classes(theirs: list[str], ours: list[str], order: list[int] | None) -> None:
    assert class_order(named(bert_config(), theirs), named(bert_config(), ours)) == order


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2, 1)])
@pytest.mark.parametrize("order", [[2, 3, 0, 1], [3, 2, 1, 0], [0, 1, 2, 3], [0, 3, 1, 2]])
def test_rows_in_another_order(shape: tuple[int, ...], order: list[int]) -> None:
    tensor = torch.randn(shape)
    found = torch.zeros(shape)
    for piece in in_order("x", shape, order):
        assert piece.taken is not None
        assert piece.inside is not None
        piece.inside.of(found).copy_(piece.taken.of(tensor))
    assert torch.equal(found, tensor[order])
    assert len(in_order("x", shape, [0, 1, 2, 3])) == 1


def test_parameters_that_grow_with_the_classes() -> None:
    with torch.device("meta"):
        assert parameters_of_classes(roberta(OURS)) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
        assert parameters_of_classes(BertForMaskedLM(bert_config())) == set()


def test_the_same_classes_in_another_order(save: Save, tmp_path: Path) -> None:
    """The expert's logits come out in the base's order, and its label map says so."""
    network = perturbed(roberta(THEIRS), 1, scale=0.3)
    base = open_base(save(roberta(OURS), "base", tmp_path))
    expert = open_expert(save(network, "a", tmp_path), base, "experts.a")
    assert not expert.head
    assert expert.notes == (
        f"experts.a: {tmp_path / 'a'} has the base's classes in another order: "
        "the rows of its head are put in the base's order",
    )
    with torch.no_grad():
        found = load_network(expert, "classification", torch.float32, "cpu")(IDS).logits
        torch.testing.assert_close(found, network.eval()(IDS).logits[:, ORDER], rtol=0, atol=1e-6)
    assert class_names(expert.config) == OURS
    assert expert.config.label2id == base.config.label2id
    assert expert.own_classes == dict(enumerate(THEIRS))
    stored = load_file(tmp_path / "a" / WEIGHTS)["classifier.out_proj.weight"]
    name = "classifier.out_proj.weight"
    assert torch.equal(expert.delta(name), stored[ORDER] - base.read(name))
    same = open_expert(save(with_names(network, OURS), "same", tmp_path), base, "experts.a")
    ours, theirs = (one.only_weights(base.only_weights()) for one in (expert, same))
    assert ours.examined(name) != theirs.examined(name)
    assert ours.examined("classifier.dense.weight") == theirs.examined("classifier.dense.weight")


@pytest.mark.parametrize("names", [["a", "b", "c", "d"], ["joy", "anger", "fear"]])
def test_other_classes_are_a_head_of_the_tasks_own(names: list[str], save: Save, tmp_path: Path) -> None:
    """All of it: the hidden layer of a head is of no use to another one."""
    network = perturbed(roberta(names), 1)
    base = open_base(save(roberta(OURS), "base", tmp_path))
    expert = open_expert(save(network, "a", tmp_path), base, "experts.a")
    layers = [f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")]
    assert sorted(expert.head) == sorted(layers)
    assert "has other classes than the base: its head is kept apart" in expert.notes[0]
    assert torch.equal(expert.read(layers[0]), base.read(layers[0]))
    with torch.no_grad():
        found = load_network(expert, "classification", torch.float32, "cpu", head_of=expert)(IDS).logits
        torch.testing.assert_close(found, network.eval()(IDS).logits, rtol=0, atol=1e-7)


@pytest.mark.parametrize("names", [[f"LABEL_{number}" for number in range(4)], OURS])
def test_classes_without_names_are_merged_as_they_are(names: list[str], save: Save, tmp_path: Path) -> None:
    network = perturbed(roberta(names), 1)
    expert = open_expert(save(network, "a", tmp_path), open_base(save(roberta(OURS), "base", tmp_path)), "experts.a")
    assert not expert.head
    assert not expert.pieces
    assert [note for note in expert.notes if "does not name its classes" in note] == list(expert.notes)
    assert bool(expert.notes) == (names != OURS)
    assert not expert.own_classes


def test_a_language_model_has_no_classes(save: Save, tmp_path: Path) -> None:
    """Its config may name some of another network all the same."""
    config = bert_config()
    network = BertForMaskedLM(config)
    base = open_base(save(network, "base", tmp_path))
    expert = open_expert(save(with_names(perturbed(network, 1), ["a", "b", "c"]), "a", tmp_path), base, "experts.a")
    assert not expert.head
    assert not expert.notes


def test_classes_of_pictures(tmp_path: Path) -> None:
    config = named(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]), OURS)
    torch.manual_seed(0)
    network = ResNetForImageClassification(config)
    network.save_pretrained(tmp_path / "base")
    with_names(perturbed(network, 1), THEIRS).save_pretrained(tmp_path / "a")
    expert = open_expert(tmp_path / "a", open_base(tmp_path / "base"), "experts.a")
    stored = load_file(tmp_path / "a" / WEIGHTS)
    for name in ("classifier.1.weight", "classifier.1.bias"):
        assert torch.equal(expert.read(name), stored[name][ORDER])
