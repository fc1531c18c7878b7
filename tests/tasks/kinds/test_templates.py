"""Templates of texts, and how far they reach."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.templates import render, template_fields


def test_templates() -> None:
    assert template_fields("Q: {question} {{x}} {a-b}{question}") == ["question", "a-b", "question"]
    assert render("{{{a}}} {b}", {"a": 1, "b": "{a}"}) == "{1} {a}"


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a:{b}}", "{a.__class__}"])
def test_templates_reach_no_further_than_the_row(template: str) -> None:
    with pytest.raises(InputError, match="template"):
        render(template, {"a": "x", "b": "y", "": "z"})


@given(st.dictionaries(st.text("abc_ -", min_size=1), st.text(), min_size=1))
def test_render_is_str_format(row: dict[str, str]) -> None:
    template = "{{" + "".join(f"<{{{name}}}" for name in row) + "}}"
    assert render(template, row) == template.format(**row)
