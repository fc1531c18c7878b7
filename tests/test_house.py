"""The house's own rules: short modules and functions, few parameters, and one class of each name."""

import ast
from collections import defaultdict
from inspect import getsourcefile
from pathlib import Path

import pytest

from sensmerge.pipeline.cli import COMMANDS

PROJECT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path for floor in ("sensmerge", "pipeline", "tasks") for path in (PROJECT / floor).rglob("*.py") if path.is_file()
)
TREES = {path.relative_to(PROJECT).as_posix(): ast.parse(path.read_text()) for path in MODULES}
MODULE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 6


def long_modules() -> set[str]:
    return {name for name in TREES if len((PROJECT / name).read_text().splitlines()) > MODULE_LINES}


def functions() -> dict[str, ast.FunctionDef]:
    """All functions, by module and name, but for commands, whose parameters are what the user may give."""
    commands = {(Path(getsourcefile(one) or "").name, one.__name__) for one in COMMANDS.values()}
    found = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (Path(name).name, node.name) not in commands:
                found[f"{name}:{node.name}"] = node
    return found


def long_functions() -> set[str]:
    return {name for name, node in functions().items() if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES}


def wide_functions() -> set[str]:
    found = set()
    for name, node in functions().items():
        arguments = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([one for one in arguments if one not in ("self", "cls")]) > PARAMETERS:
            found.add(name)
    return found


def classes() -> dict[str, list[str]]:
    found = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name)
    return found


def namesakes() -> set[str]:
    return {name for name, modules in classes().items() if len(modules) > 1}


def test_modules_are_short() -> None:
    assert long_modules() == set()


def test_functions_are_short() -> None:
    assert long_functions() == set()


def test_functions_have_few_parameters() -> None:
    assert wide_functions() == set()


def test_no_two_classes_have_one_name() -> None:
    assert namesakes() == set()


@pytest.mark.parametrize("name", sorted(TREES))
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(TREES[name])
