"""The examples of docs/contributing.md do what the page says: their code runs, and so do their tests."""

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sensmerge.tasks.kinds.kind import KINDS
from sensmerge.tasks.methods.contract import METHODS
from sensmerge.tasks.registry import Registry
from sensmerge.tasks.statistics.statistic import STATISTICS
from tests.conftest import forgotten
from tests.docs.pages import DOCS

SECTIONS = re.split(r"^## ", (DOCS / "contributing.md").read_text(), flags=re.MULTILINE)
BLOCK = re.compile(r"^<!-- complete -->\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = {section.partition("\n")[0]: BLOCK.findall(section) for section in SECTIONS if BLOCK.search(section)}
"""Complete blocks by the section in which they stand."""
REGISTRIES: tuple[Registry[Any], ...] = (METHODS, STATISTICS, KINDS)


@pytest.fixture
def _registries() -> Iterator[None]:
    """Forget what an example registers: other tests look at all that is registered."""
    with forgotten(*REGISTRIES):
        yield


@pytest.fixture
def module(_registries: None, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The blocks of a section as one module."""
    made = ModuleType(re.sub(r"\W+", "_", request.param).lower())
    sys.modules[made.__name__] = made
    for block in EXAMPLES[request.param]:
        exec(compile(block, f"contributing.md, {request.param}", "exec", dont_inherit=True), made.__dict__)
    yield made
    del sys.modules[made.__name__]


@pytest.mark.parametrize("module", EXAMPLES, indirect=True)
def test_the_tests_of_an_example_pass(module: ModuleType, tmp_path: Path) -> None:
    tests = [function for name, function in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(**{"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {})


@pytest.mark.parametrize("section", EXAMPLES)
def test_examples_are_short(section: str) -> None:
    assert max(len(block.splitlines()) for block in EXAMPLES[section]) < 40
