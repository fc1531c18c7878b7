"""What the census finds, in Markdown."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from tests.census.zoo import FAMILIES
from tests.docs.pages import Block

ZOO = Block("zoo", "architectures.md", "python -m tests.census --zoo")
CAUSAL = Block("causal", "architectures.md", "python -m tests.census")
STATUSES = ("right", "refused", "failed", "wrong")
_MARKS = {"right": "✔"}

Found = Mapping[str, str]
"""By column, what it says of an architecture."""


def row(name: str, found: Found) -> str:
    """Return the row of an architecture: a mark for what is right, and a word for all else."""
    statuses = (said.partition(":")[0] for said in found.values())
    return f"| {name} | " + " | ".join(_MARKS.get(status, status) for status in statuses) + " |"


def reasons(name: str, found: Found) -> list[str]:
    """Return a line for each reason for which columns are not right."""
    columns: dict[str, list[str]] = {}
    for column, said in found.items():
        if said != "right":
            columns.setdefault(" ".join(said.removeprefix("refused: ").split())[:400], []).append(column)
    return [f"- {name}, {', '.join(names)}: {said}" for said, names in columns.items()]


def zoo_table(found: Mapping[str, Found], columns: Collection[str]) -> str:
    """Return a table for each family, and a line for everything that is not right."""
    lines = []
    for family, names in FAMILIES.items():
        lines += ["", *_head(family, columns), *(row(name, found[name]) for name in names)]
    return "\n".join([*lines[1:], "", "Refused:", "", *(line for name in found for line in reasons(name, found[name]))])


def causal_table(found: Mapping[str, Found], columns: Sequence[str]) -> str:
    """Return totals, a row per architecture, and lines for everything that is not right or was not tried."""
    tried = {name: one for name, one in found.items() if "tiny" not in one}
    counts = {column: Counter(one[column].partition(":")[0] for one in tried.values()) for column in columns}
    lines = _head("", columns)
    lines += [
        f"| {status} | " + " | ".join(str(counts[column][status]) for column in columns) + " |" for status in STATUSES
    ]
    lines += ["", *_head("architecture", columns), *(row(name, one) for name, one in tried.items())]
    lines += ["", "Not right:", "", *(line for name, one in tried.items() for line in reasons(name, one))]
    lines += ["", "Not tried:", ""]
    lines += [f"- {name}: {' '.join(one['tiny'].split())[:150]}" for name, one in found.items() if "tiny" in one]
    return "\n".join(lines)


def _head(title: str, columns: Collection[str]) -> list[str]:
    return [f"| {title} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
