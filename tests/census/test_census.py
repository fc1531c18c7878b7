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
ALL = dict.fromkeys(OF_THE_ZOO, "right")
WITHOUT_PARTS = ALL | {"sens streamed": "refused"}
ONLY_STATIC = {column: "right" if column in ("static", "loads") else "refused" for column in OF_THE_ZOO}


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_is_what_the_table_says(name: str) -> None:
    found = census(name, OF_THE_ZOO)
    lines = [line for line in LINES if re.match(rf"(\| {name} \||- {name}, )", line)]
    assert lines == [row(name, found), *reasons(name, found)], f"renew the table with `{ZOO.command}`"


@pytest.mark.parametrize(
    ("families", "allowed"),
    [
        (("decoders", "mixtures of experts", "state spaces and hybrids"), (ALL, WITHOUT_PARTS)),
        (("encoders", "vision and language"), (ALL, WITHOUT_PARTS, ONLY_STATIC)),
    ],
)
def test_what_the_table_may_say(families: tuple[str, ...], allowed: tuple[dict[str, str], ...]) -> None:
    for name in (name for family in families for name in FAMILIES[family]):
        assert any(row(name, found) in LINES for found in allowed), name


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name: str, tmp_path: Path) -> None:
    assert se.lora(make_case(name, tmp_path)) == "right"


def test_adapters_of_tensors_that_are_split(tmp_path: Path) -> None:
    said = se.lora(make_case("HrmTextForCausalLM", tmp_path))
    assert "whose weight the base's files hold in another form" in said
