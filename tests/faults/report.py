"""The table of a campaign."""

from collections.abc import Sequence

from tests.faults.kills import Outcome

HEADING = "| fault | command | points | harm |\n| --- | --- | --- | --- |\n"


def table(outcomes: Sequence[Outcome]) -> str:
    """Return Markdown: a row for every fault and command, and below what was wrong. What came too late is no fault."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for one in [one for one in outcomes if one.came]:
        found.setdefault((one.fault, one.command), []).append(one)
    lines = [
        f"| {fault} | {command} | {len(some)} | {sum(bool(one.harm) for one in some) or 'none'} |"
        for (fault, command), some in sorted(found.items())
    ]
    wrong = [f"- {one.command}, {one.fault}, {one.where}: {'; '.join(one.harm)[:1500]}" for one in outcomes if one.harm]
    return HEADING + "".join(f"{line}\n" for line in (*lines, *([""] if wrong else []), *wrong))
