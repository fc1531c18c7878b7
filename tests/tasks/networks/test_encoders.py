"""Encoders whose blocks transformers does not name, or that have one for all layers: whole, in parts, and plain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
)

from sensmerge.tasks.checkpoints.layers import layer_of
from sensmerge.tasks.networks.blocks import blocks_of
from sensmerge.tasks.networks.journeys import Measured
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.statistics.sensitivity import Sensitivity
from tests.conftest import perturbed

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 1, "num_labels": 3}
ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**TEXT, **SIZE, embedding_size=16)),
    "deberta": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**TEXT, **SIZE, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
    ),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**TEXT, dim=32, hidden_dim=48, n_layers=3, n_heads=4)
    ),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**TEXT, **SIZE)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**TEXT, **SIZE, embedding_size=16)),
}
SAMPLES = [
    {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "labels": torch.tensor([label]),
    }
    for label, ids in enumerate(([5, 6, 7], [9, 8, 7, 6, 5], [11, 12]))
]


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Source, PreTrainedModel]:
    """A classifier fine-tuned from a trunk, as a source and as transformers has it."""
    torch.manual_seed(0)
    network = ENCODERS[request.param]().eval()
    network.base_model.save_pretrained(tmp_path / "base")
    perturbed(network, 1).save_pretrained(tmp_path / "expert")
    source = Source(tmp_path / "base", tmp_path / "expert", "experts.mood", "classification", torch.float32, "cpu")
    return source, network


def measured(source: Source, placement: Placement, scratch: Path) -> list[Measured]:
    with open_runner(source, placement, scratch, {"sensitivity": Sensitivity()}) as runner:
        found = dict(runner.run(SAMPLES, lambda *_: None))
    return [found[number] for number in range(len(SAMPLES))]


def test_sensitivity(encoder: tuple[Source, PreTrainedModel], tmp_path: Path) -> None:
    source, network = encoder
    prefix = f"{network.base_model_prefix}."
    for sample, whole, parts in zip(
        SAMPLES, measured(source, "whole", tmp_path), measured(source, "streamed", tmp_path), strict=True
    ):
        network.zero_grad()
        network(**sample).loss.backward()
        expected: dict[str, float] = {}
        for name, parameter in network.named_parameters():
            if name.startswith(prefix):
                layer = layer_of(name.removeprefix(prefix))
                change = float((parameter.detach() * parameter.grad).abs().sum())
                expected[layer] = expected.get(layer, 0.0) + change
        assert {key: value for key, value in whole.sums["sensitivity"].items() if key in expected} == pytest.approx(
            expected, rel=1e-4
        )
        assert parts.sums["sensitivity"] == pytest.approx(whole.sums["sensitivity"], rel=1e-4)
        assert parts.loss == pytest.approx(whole.loss)


def test_trunks(encoder: tuple[Source, PreTrainedModel], tmp_path: Path) -> None:
    source, network = encoder
    inputs = [{key: one[key] for key in ("input_ids", "attention_mask")} for one in SAMPLES]
    with torch.no_grad(), open_runner(source, "streamed", tmp_path) as runner:
        for number, output in runner.trunk_outputs(inputs):
            expected = network.base_model(**inputs[number]).last_hidden_state
            torch.testing.assert_close(output["hidden"], expected, rtol=1e-4, atol=1e-5)


def test_blocks(encoder: tuple[Source, PreTrainedModel]) -> None:
    source, network = encoder
    expected = 1 if "Albert" in type(network).__name__ else 3
    assert len(blocks_of(source.hollow())) == expected
