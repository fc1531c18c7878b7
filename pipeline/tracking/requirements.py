"""What has to be installed to serve a merged model: found from the imports of the module that serves it."""

import ast
import atexit
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

import sensmerge

PROJECT = "sensmerge"
SERVING = "tasks"
"""Part of the project whose source travels with a model; it imports no other."""


@cache
def source_copy() -> Path:
    """Return a folder with what serves a model, as a package that can be imported from it; it is there until exit."""
    folder = Path(mkdtemp(prefix="sensmerge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, target = Path(sensmerge.__file__).parent, folder / PROJECT
    shutil.copytree(source / SERVING, target / SERVING, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(source / "__init__.py", target)
    return target


@cache
def requirements(module: str, *others: str) -> tuple[str, ...]:
    """Return the distributions, pinned to their versions here, that importing a module of the project needs.

    Its imports are followed through the project's modules. Imports within functions are left out: those are of what
    reads data sets and runs clusters, not of what serves.

    Args:
        module: such as `sensmerge.tasks.serving.scorer`.
        others: packages of other distributions that are needed as well.
    """
    found, open_ends, seen = set(others), [module], set[str]()
    while open_ends:
        name = open_ends.pop()
        if name in seen:
            continue
        seen.add(name)
        for imported in _imports(name):
            if imported.partition(".")[0] == PROJECT:
                open_ends.append(imported)
            else:
                found.add(imported.partition(".")[0])
    owners = packages_distributions()
    names = {owners[package][0] for package in found - sys.stdlib_module_names}
    return tuple(f"{name}=={version(name).partition('+')[0]}" for name in sorted(names, key=str.lower))


def _imports(module: str) -> Iterator[str]:
    """Yield the modules that a module of the project imports as soon as it is imported itself."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    statements = list(ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body)
    while statements:
        statement = statements.pop()
        match statement:
            case ast.Import(names):
                yield from (one.name for one in names)
            case ast.ImportFrom(module=str(source), names=names):
                yield source
                if source.partition(".")[0] == PROJECT:  # what it takes from a package may be a module
                    yield from (f"{source}.{one.name}" for one in names if _is_module(f"{source}.{one.name}"))
            case ast.If(test=ast.Name("TYPE_CHECKING"), orelse=other):
                statements += other
            case ast.If(body=body, orelse=other):
                statements += [*body, *other]
            case ast.Try(body=body):
                statements += body


def _is_module(name: str) -> bool:
    parent = find_spec(name.rpartition(".")[0])
    return parent is not None and parent.submodule_search_locations is not None and find_spec(name) is not None
