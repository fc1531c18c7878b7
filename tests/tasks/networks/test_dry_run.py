"""What plan tries on tiny networks, and what it finds."""

from pathlib import Path

import pytest
import torch
from transformers import (
    DebertaV2Config,
    GitConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    ReformerConfig,
    ZayaConfig,
)

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.blocks import Part
from sensmerge.tasks.networks.dry_run import StandIn, stand_in
from sensmerge.tasks.networks.networks import Head
from sensmerge.tasks.networks.watching import Statistics
from sensmerge.tasks.statistics.fisher import Fisher
from sensmerge.tasks.statistics.gram import Gram
from sensmerge.tasks.statistics.sensitivity import Sensitivity
from tests.conftest import llama_config

STATISTICS: Statistics = {"sensitivity": Sensitivity()}
ALL: Statistics = STATISTICS | {"gram": Gram(), "fisher": Fisher()}


def tried(config: PretrainedConfig, folder: Path, head: Head = "causal_lm") -> StandIn:
    found = stand_in(config, head, Path("base"), folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (LlamaConfig(), "causal_lm"),  # seven billion parameters
        (MixtralConfig(), "causal_lm"),
        (LlamaConfig(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}), "causal_lm"),
        (DebertaV2Config(), "classification"),
        (LlamaConfig(num_labels=5), "classification"),
    ],
)  # fmt: skip
def test_networks_that_can_do_all(config: PretrainedConfig, head: Head, tmp_path: Path) -> None:
    before, state = config.to_dict(), torch.get_rng_state()
    tiny = tried(config, tmp_path, head)
    tiny.check_statistics(ALL)
    tiny.check_head()
    tiny.check_parts(ALL)
    tiny.check_parts({"gram": Gram()})
    tiny.check_calibration()
    if head == "causal_lm":
        tiny.check_generation()
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_totals_that_differ_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tried(LlamaConfig(), tmp_path)
    tiny.check_parts({"gram": Gram()})
    forward = Part.forward
    monkeypatch.setattr(Part, "forward", lambda part, hidden, *more: forward(part, 1.1 * hidden, *more))
    with pytest.raises(InputError, match=r"^LlamaForCausalLM: it cannot be run in parts \(.+\.weight differs\)$"):
        tiny.check_parts({"gram": Gram()})


def test_what_blocks_hand_on_beside_hidden_states(tmp_path: Path) -> None:
    tiny = tried(ZayaConfig(), tmp_path)
    tiny.check_statistics(STATISTICS)
    tiny.check_head()
    with pytest.raises(InputError, match=r"^ZayaForCausalLM: it cannot be run in parts \(.+\)$"):
        tiny.check_parts(STATISTICS)


def test_a_network_that_takes_more_than_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^GitForCausalLM: it has no loss on text alone \(Expected input batch_size"):
        stand_in(GitConfig(), "causal_lm", Path("base"), tmp_path)


def test_a_network_that_has_no_gradient_in_evaluation(tmp_path: Path) -> None:
    config = ReformerConfig(
        is_decoder=True, hidden_size=32, axial_pos_shape=(8, 8), axial_pos_embds_dim=(16, 16), feed_forward_size=48
    )
    with pytest.raises(InputError, match=r"^ReformerModelWithLMHead: it has no loss on text alone \(If you want to"):
        stand_in(config, "causal_lm", Path("base"), tmp_path)


def test_a_classifier_does_not_generate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^LlamaForSequenceClassification: it cannot generate \(.*generate"):
        tried(llama_config(), tmp_path, "classification").check_generation()
