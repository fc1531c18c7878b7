"""What MLflow serves: when a model has a lease, and what its process imports."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from sensmerge.pipeline.tracking.requirements import requirements
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.generation import Decoding
from sensmerge.tasks.serving import scorer
from sensmerge.tasks.serving.lease import held
from tests.pipeline.tracking import test_record
from tests.tasks.serving import test_static_model

PROJECT = Path(__file__).resolve().parents[3]
static_writer, dynamic_writer = test_static_model.writer, test_record.writer  # the same models serve here


def test_a_model_is_leased_before_it_is_loaded(
    static_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "merge" / "ta-12345678"
    folder.parent.mkdir()
    folder.symlink_to(static_writer)
    (static_writer / "manifest.json").touch()
    load, during = scorer.StaticModel.load, []

    def observed(*arguments: Any) -> Any:
        during.extend(held(str(tmp_path)))
        return load(*arguments)

    monkeypatch.setattr(scorer.StaticModel, "load", observed)
    served = scorer.Scorer(str(folder), "cpu", None)
    assert [one.artifact for one in during] == ["merge/ta-12345678"]
    assert len(held(str(tmp_path))) == 1
    del served


def test_a_model_that_cannot_be_loaded_keeps_no_lease(tmp_path: Path) -> None:
    folder = tmp_path / "merge" / "ta-12345678"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InputError) as raised:
        scorer.Scorer(str(folder), "cpu", None)
    assert held(str(tmp_path)) == [], raised


def served(folder: Path) -> set[str]:
    """The modules in a process that loads a model and answers a text."""
    program = (
        "import sys\n"
        "from sensmerge.tasks.serving.scorer import _load_pyfunc\n"
        f"found = _load_pyfunc({str(folder)!r}).predict(['1+2='], {{'max_new_tokens': 2}})\n"
        "assert len(found) == 1\n"
        "print(*sys.modules, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def third_party(module: str) -> set[str]:
    """The packages of others that a module of the project imports, also within functions."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tops = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Import):
            tops |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            tops.add(node.module.partition(".")[0])
    return tops - sys.stdlib_module_names - {"sensmerge"}


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_what_serving_imports_is_required_and_no_more_than_it_needs(
    kind: str, static_writer: Path, dynamic_writer: Any
) -> None:
    """Everything that our modules import, those of functions too, as far as the process has it after an answer."""
    modules = served(static_writer if kind == "static" else dynamic_writer[0])
    ours = {name for name in modules if name.startswith("sensmerge.")}
    assert {name for name in ours if name.startswith(("sensmerge.pipeline", "sensmerge.tasks.stages"))} == set()
    owners = packages_distributions()
    used = {owners[top][0] for name in ours for top in third_party(name) if top in modules}
    assert used - {line.partition("==")[0] for line in requirements("sensmerge.tasks.serving.scorer")} == set()


PROMPTS = {"math": {"kind": "completion", "prompt": "{a}+{b}=", "max_length": 512}}


def test_tables_say_how_their_rows_are_asked(static_writer: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = scorer._load_pyfunc(str(static_writer), {"prompts": PROMPTS})
    five = {"max_new_tokens": 5}
    rows = {"task": ["math", None], "a": ["1", None], "b": ["2", None], "text": [None, "9"]}
    first = served.predict(pd.DataFrame({"a": [1], "b": [2]}), five | {"task": "math"})
    assert caplog.text == ""
    expected = served.predict(["1+2=", "9"], five)
    assert "in no prompt: name the task in a column `task`, one of math" in caplog.text
    caplog.clear()
    pd.testing.assert_frame_equal(first, expected[:1])
    for given in (pd.DataFrame(rows), rows, pd.DataFrame({"text": ["1+2=", "9"]})):
        pd.testing.assert_frame_equal(served.predict(given, five), expected)
    assert caplog.text == ""  # it is said once
    for given, params, said in (
        (["1+2="], {"task": "math"}, "task is math; expected none, the model is one whole network"),
        (pd.DataFrame({"a": [1]}), {"task": "math"}, "tasks.math.prompt names field 'b', text 0 has 'task', 'a'"),
        (pd.DataFrame({"a": [1]}), {"task": "code"}, "text 0: task is 'code'; expected one of math"),
        (pd.DataFrame({"messages": [[{"role": "user", "content": "a"}]]}), {}, "has no chat template"),
        (["9"], {"top_k": 4}, "found the parameter top_k; expected task, max_new_tokens, temperature"),
        (["9"], {"temperature": "warm"}, "expected numbers, and texts in stop"),
        (["9"], {"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        (9, {}, "found 9; expected a list of texts, or a table"),
        ({"task": ["math"], "a": [1, 2]}, {}, "found columns that are no table"),
    ):
        with pytest.raises(MlflowException, match=said) as raised:
            served.predict(given, params)
        assert raised.value.get_http_status_code() == 400


def test_parameters_are_how_continuations_are_written(static_writer: Path) -> None:
    served = scorer._load_pyfunc(str(static_writer))
    model = served.get_raw_model()
    assert isinstance(model, scorer.StaticModel)
    how = Decoding(temperature=0.8, top_p=0.9, seed=5, stop=("e", "xy"))
    expected = model.predict(["1+2=", "9"], 12, decoding=how)
    params = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 5, "stop": ["e", "xy"]}
    assert served.predict(["1+2=", "9"], params)["prediction"].tolist() == expected
    assert served.predict(["9"], {"stop": "e"})["prediction"].tolist() == model.predict(
        ["9"], decoding=Decoding(stop=("e",))
    )
    assert served.predict(["9"], dict.fromkeys(params, None))["prediction"].tolist() == model.predict(["9"])


def test_a_task_says_nothing_of_texts_to_a_dynamic_model(dynamic_writer: Any) -> None:
    served = scorer._load_pyfunc(str(dynamic_writer[0]))
    with pytest.raises(MlflowException, match="task is math, but texts have no fields for its prompt; give a table"):
        served.predict(["1+1="], {"task": "math"})
    table = served.predict(pd.DataFrame({"prompt": ["1+1="]}), {"task": "math", "max_new_tokens": 3})
    pd.testing.assert_frame_equal(table, served.predict(["1+1="], {"max_new_tokens": 3}))
