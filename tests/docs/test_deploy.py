"""The code of docs/deploy.md does what the page says, and the page says what infra/serve.py is."""

import re
from pathlib import Path
from typing import Any

import pytest

from sensmerge import Decoding
from sensmerge.tasks.dynamic.model import DynamicModel
from sensmerge.tasks.kinds.kind import KINDS, RowTask
from sensmerge.tasks.networks.generation import MAX_NEW_TOKENS
from sensmerge.tasks.serving.static_model import StaticModel
from tests.docs.pages import DOCS
from tests.pipeline.tracking import test_record
from tests.tasks.serving import test_static_model

# the same models serve here
static_writer, dynamic_writer, heads = test_static_model.writer, test_record.writer, test_static_model.trunk
PAGE = (DOCS / "deploy.md").read_text()
BLOCKS = dict(re.findall(r"^<!-- (\w+) -->\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


def done(block: str, folder: Path, **known: Any) -> dict[str, Any]:
    """Run a block with a folder in place of FOLDER, and return what it has defined."""
    names = dict(known)
    code = BLOCKS[block].replace("FOLDER", str(folder))
    exec(compile(code, f"deploy.md, {block}", "exec", dont_inherit=True), names)
    return names


def test_transformers(static_writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done("static", static_writer)
    (expected,) = StaticModel.load(static_writer).predict(["3 + 4 ="], 8)
    assert capsys.readouterr().out == f"{expected}\n"


def test_transformers_with_the_head_of_a_task(heads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done("heads", heads)
    (expected,) = StaticModel.load(heads).predict(["a fine film"], task="topic")
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_python(dynamic_writer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dynamic_writer[0]
    done("dynamic", folder)
    (one,) = DynamicModel.load(folder).predict(["3 + 4 ="], 8)
    line = f"{one.prediction} {one.expert} {one.coefficients}\n"
    assert capsys.readouterr().out == f"{line}{line}{one.prediction}"


def test_the_router_in_front_of_adapters(dynamic_writer: Any) -> None:
    model = DynamicModel.load(dynamic_writer[0])
    for row in ({"task": "math", "prompt": "1+1="}, "7-7="):
        assert done("router", dynamic_writer[0], model=model, row=row)["expert"] == model.predict([row])[0].expert


def test_parameters_and_kinds_are_all_there_are() -> None:
    table = PAGE.partition("| parameter | default |")[2].partition("\n\n")[0]
    defaults = {"max_new_tokens": MAX_NEW_TOKENS, **vars(Decoding())}
    found = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.MULTILINE))
    assert found.keys() == defaults.keys()
    assert all(float(found[name]) == default for name, default in defaults.items() if name != "stop")
    said = re.search(r"Kinds with a prompt format are (.*?)\.", PAGE, re.DOTALL)
    assert said is not None
    asked = {name for name, one in KINDS.items() if issubclass(one, RowTask) and one.asks}
    assert set(re.findall(r"`(\w+)`", said[1])) == asked
