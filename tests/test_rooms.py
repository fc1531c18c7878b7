"""Which room imports which: downwards only, and each outside package where it belongs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
ROOMS = {
    "pipeline": ["", "tracking", "report", "execute", "plan", "store", "recipe"],
    "tasks": [
        "stages",
        "serving",
        "dynamic",
        "kinds",
        "sandbox",
        "rows",
        "networks",
        "checkpoints",
        "methods",
        "statistics",
        "",
    ],
}
"""The rooms of both floors from top to bottom; "" stands for the modules beside them."""
MODULES = sorted(path for floor in ROOMS for path in (PROJECT / floor).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """All that a module imports, also within functions; not what only type checkers read."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=other):
                nodes += other
                continue
            case ast.Import(names):
                yield from (one.name for one in names)
            case ast.ImportFrom(module=str(source)):
                yield source
        nodes += ast.iter_child_nodes(node)


def place(module: str) -> tuple[str, str]:
    """The floor and the room of a module of the project."""
    _, floor, *rest = module.split(".")
    return floor, rest[0] if rest and (PROJECT / floor / rest[0]).is_dir() else ""


def name(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def test_every_room_is_listed() -> None:
    for floor, rooms in ROOMS.items():
        found = {path.parent.name for path in (PROJECT / floor).glob("*/__init__.py")}
        assert found == set(rooms) - {""}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_downwards(path: Path) -> None:
    floor, room = place("sensmerge." + name(path)[:-3].replace("/", "."))
    for module in imports(path):
        if not module.startswith("sensmerge."):
            assert module.partition(".")[0] not in ROOMS, f"{module} is called sensmerge.{module}"
            continue
        other_floor, other = place(module)
        if other_floor != floor:
            assert (floor, other_floor) == ("pipeline", "tasks"), f"{module} is a floor above"
        else:
            assert ROOMS[floor].index(room) <= ROOMS[floor].index(other), f"{module} is a room above"


@pytest.mark.parametrize(
    ("package", "places"),
    [
        ("ray", ["pipeline/execute/", "tasks/networks/sharded.py"]),
        ("mlflow", ["pipeline/tracking/", "tasks/serving/scorer.py"]),
        (
            "transformers",
            ["pipeline/", "tasks/stages/", "tasks/serving/", "tasks/dynamic/", "tasks/kinds/", "tasks/networks/"],
        ),
    ],
)
def test_packages_are_imported_where_they_belong(package: str, places: list[str]) -> None:
    found = [name(path) for path in MODULES if any(one.partition(".")[0] == package for one in imports(path))]
    assert found
    assert [path for path in found if not path.startswith(tuple(places))] == []


def test_reading_a_recipe_needs_no_torch() -> None:
    for path in (PROJECT / "pipeline" / "recipe").glob("*.py"):
        assert {"torch", "transformers"}.isdisjoint(one.partition(".")[0] for one in imports(path))


def test_no_module_imports_itself_in_a_circle() -> None:
    known = {"sensmerge." + name(path)[:-3].replace("/", ".").removesuffix(".__init__"): path for path in MODULES}
    state: dict[str, str] = {}

    def visit(module: str, way: list[str]) -> None:
        assert state.get(module) != "open", f"{' → '.join([*way, module])}"
        if module in state or module not in known:
            return
        state[module] = "open"
        for one in imports(known[module]):
            visit(one, [*way, module])
        state[module] = "done"

    for module in known:
        visit(module, [])
