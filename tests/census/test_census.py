"""A sample of the census; `python -m tests.census` takes all of it."""

from pathlib import Path

import pytest

from tests.census import se, sens
from tests.census.cases import make_case

SAMPLE = [
    "LlamaForCausalLM",
    "MixtralForCausalLM",  # experts that are stacked
    "OPTForCausalLM",  # its head calls the decoder in the trunk
    "CamembertForCausalLM",  # has its head before the trunk
    "ElectraForCausalLM",  # transformers names no blocks
    "FalconH1ForCausalLM",  # its head reads a setting of the trunk
    "HrmTextForCausalLM",  # files hold tensors that it splits
    "Inkling2ForCausalLM",  # patterns of old names match today's
    "LagunaForCausalLM",  # so do they here
    "MambaForCausalLM",  # its head passes the trunk's cache on
    "ZambaForCausalLM",  # has blocks that share weights
    "ZayaForCausalLM",  # hands more than hidden states from block to block
]
ADAPTERS_REFUSED = {"HrmTextForCausalLM"}
REFUSED = {"HrmTextForCausalLM", "ZambaForCausalLM", "ZayaForCausalLM"}


@pytest.mark.parametrize("name", SAMPLE)
def test_sens(name: str, tmp_path: Path) -> None:
    case = make_case(name, tmp_path, lora=False)
    assert sens.whole(case) == "right"
    assert sens.distances(case) == "right"
    streamed = sens.streamed(case)
    if name in REFUSED:
        assert streamed.startswith(f"refused: placement: {name}")
        assert "; set placement: whole" in streamed
    else:
        assert streamed == "right"


@pytest.mark.parametrize("name", SAMPLE)
def test_se(name: str, tmp_path: Path) -> None:
    case = make_case(name, tmp_path)
    assert se.full(case) == "right"
    if name in ADAPTERS_REFUSED:
        assert "whose weight the base's files hold in another form" in se.lora(case)
    else:
        assert se.lora(case) == "right"
