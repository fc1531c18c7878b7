"""The zoo in every way, and a sample of the census with adapters; `python -m tests.census` takes all of it."""

import re
from pathlib import Path

import pytest

from tests.census import se
from tests.census.cases import make_case
from tests.census.columns import OF_THE_ZOO, census
from tests.census.tables import ZOO, reasons, row
from tests.census.zoo import FAMILIES

NAMES = [name for names in FAMILIES.values() for name in names]
ADAPTED = [
    "LlamaForCausalLM",
    "CamembertForCausalLM",
    "ElectraForCausalLM",
    "FalconH1ForCausalLM",
    "LagunaForCausalLM",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "ZambaForCausalLM",
    "ZayaForCausalLM",
]
LINES = ZOO.text.splitlines()
_ROWS = [line.strip("| ").split(" | ") for line in LINES if line.startswith("| ") and line.split()[1] in NAMES]
CELLS = {name: dict(zip(OF_THE_ZOO, cells, strict=True)) for name, *cells in _ROWS}
"""What the table says of each architecture, by column."""
UNLIKE_OTHER_ENCODERS = {"LongformerForSequenceClassification", "XLNetForSequenceClassification"}


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_what_the_table_says(name: str) -> None:
    found = census(name, OF_THE_ZOO)
    lines = [line for line in LINES if re.match(rf"(\| {name} \||- {name}, )", line)]
    assert lines == [row(name, found), *reasons(name, found)], f"renew the table with `{ZOO.command}`"


def test_what_holds_for_all_architectures() -> None:
    assert list(CELLS) == NAMES
    assert all(found["static"] == found["loads"] == "✔" for found in CELLS.values())


@pytest.mark.parametrize("family", ["decoders", "mixtures of experts", "state spaces and hybrids", "encoders"])
def test_what_holds_for_networks_of_texts(family: str) -> None:
    """What cannot be run in parts is run whole."""
    for name in FAMILIES[family]:
        refused = {column for column, cell in CELLS[name].items() if cell != "✔"}
        assert refused <= {"sens streamed"} or name in UNLIKE_OTHER_ENCODERS, name


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name: str, tmp_path: Path) -> None:
    assert se.lora(make_case(name, tmp_path)) == "right"


def test_adapters_of_tensors_that_are_split(tmp_path: Path) -> None:
    said = se.lora(make_case("HrmTextForCausalLM", tmp_path))
    assert "whose weight the base's files hold in another form" in said
