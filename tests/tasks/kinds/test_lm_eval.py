"""What of lm-eval's tasks runs programs that models wrote, found before anything is run; skipped without lm-eval."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.lm_eval import LmEvalTask, _runs_code

UNSAFE = "task: words\ndataset_path: json\nunsafe_code: true\noutput_type: multiple_choice\n"


def entry(config: object, *members: str) -> SimpleNamespace:
    return SimpleNamespace(cfg=config, yaml_path=None, tags=set(members))


INDEX = {
    "safe": entry({"task": "safe"}, "tag"),
    "unsafe": entry({"task": "unsafe", "unsafe_code": True}),
    "tag": entry(None, "safe", "unsafe"),
    "group": entry({"group": "group", "task": ["safe", "inner"]}),
    "inner": entry({"group": "inner", "task": ["group", {"group": "written", "task": [{"task": "unsafe"}]}]}),
    "written": entry({"group": "written", "task": [{"task": "own", "unsafe_code": True, "doc_to_text": "x" * 5000}]}),
    "harmless": entry({"group": "harmless", "task": ["safe", {"task": "safe", "num_fewshot": 1}]}),
}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("safe", None),
        ("unsafe", "unsafe"),
        ("tag", "unsafe"),
        ("group", "unsafe"),
        ("written", "own"),
        ("harmless", None),
        ("unknown", None),
    ],
)
def test_a_task_that_runs_code_is_found_in_groups_and_tags(name: str, found: str | None) -> None:
    assert _runs_code(name, INDEX) == found


def test_it_is_refused_unless_the_recipe_allows_it(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    path = tmp_path / "words.yaml"
    path.write_text(UNSAFE)
    with pytest.raises(InputError, match=r"^tasks\.x\.names: words runs programs that models wrote"):
        LmEvalTask(kind="lm_eval", names=["arc_easy", str(path)]).check_installed("tasks.x")
    names = ["humaneval", str(path)]
    LmEvalTask(kind="lm_eval", names=names, run_untrusted_code=True).check_installed("tasks.x")
