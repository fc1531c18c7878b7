"""A sample of the census; `python -m tests.census` takes all of it."""

from pathlib import Path

import pytest

from tests.census import sens
from tests.census.cases import make_case

SAMPLE = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",  # positions that are learned
    "MixtralForCausalLM",  # experts that are stacked
    "OPTForCausalLM",  # its head calls the decoder in the trunk
    "CamembertForCausalLM",  # has its head before the trunk
    "ElectraForCausalLM",  # transformers names no blocks
    "FalconH1ForCausalLM",  # its head reads a setting of the trunk
    "Inkling2ForCausalLM",  # patterns of old names match today's
    "LagunaForCausalLM",  # so do they here
    "MambaForCausalLM",  # its head passes the trunk's cache on
    "ZambaForCausalLM",  # has blocks that share weights
    "ZayaForCausalLM",  # hands more than hidden states from block to block
]
REFUSED = {"Inkling2ForCausalLM", "ZambaForCausalLM", "ZayaForCausalLM"}


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
