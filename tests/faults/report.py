"""The table of a campaign."""

from collections.abc import Sequence

from tests.faults.kills import Outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """Return Markdown: a row for every fault, by command the points and the harm done; and below what was wrong.

    What came too late is no fault.
    """
    found: dict[str, dict[str, list[Outcome]]] = {}
    for one in [one for one in outcomes if one.came]:
        found.setdefault(one.fault, {}).setdefault(one.command, []).append(one)
    commands = list(dict.fromkeys(one.command for one in outcomes))
    lines = ["| fault, by command: points, harm | " + " | ".join(commands) + " |", "| --- |" + " --- |" * len(commands)]
    for fault, by_command in found.items():
        lines.append(f"| {fault} | " + " | ".join(_cell(by_command.get(one, [])) for one in commands) + " |")
    wrong = [f"- {one.command}, {one.fault}, {one.where}: {'; '.join(one.harm)[:1500]}" for one in outcomes if one.harm]
    return "".join(f"{line}\n" for line in (*lines, *([""] if wrong else []), *wrong))


def _cell(outcomes: Sequence[Outcome]) -> str:
    return f"{len(outcomes)}, {sum(bool(one.harm) for one in outcomes) or 'none'}" if outcomes else ""
