"""The pages for readers: what is generated is up to date, links lead somewhere, and recipes in them are valid."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from sensmerge.pipeline.recipe.schema import Recipe
from tests.docs.pages import BLOCKS, DOCS, Block
from tests.docs.reference import reference
from tests.test_rooms import ROOMS

PROJECT = DOCS.parent
PAGES = sorted(PROJECT.glob("*.md")) + sorted(DOCS.glob("*.md")) + sorted((PROJECT / "infra").rglob("*.md"))


def name(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    }


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_what_is_generated_is_up_to_date(block: Block) -> None:
    page = block.page_with(BLOCKS[block]())
    assert block.path.read_text() == page, f"{block.page}: out of date; renew it with `{block.command}`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name(page)}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}: there is no such heading"


def test_no_page_is_an_island() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    linked = {(page.parent / link).resolve() for page, link in links}
    assert [name(page) for page in sorted(DOCS.glob("*.md")) if page not in linked] == []


def test_the_first_recipe_is_one() -> None:
    blocks = re.findall(r"^```yaml\n(name: .*?)^```", (PROJECT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (recipe,) = [Recipe.model_validate(yaml.safe_load(block)) for block in blocks]
    jsonschema.validate(yaml.safe_load(blocks[0]), Recipe.model_json_schema())  # as editors check it
    assert recipe.se_variants()
    assert recipe.sens_variants()


def test_the_readme_stays_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


def test_a_schema_becomes_tables() -> None:
    inner = {"description": "One.", "properties": {"n": {"type": "integer", "minimum": 1, "default": 2}}}
    schema = {
        "description": "All.",
        "properties": {"things": {"patternProperties": {"^a": {"$ref": "#/$defs/Thing"}}, "type": "object"}},
        "required": ["things"],
        "$defs": {"Thing": inner},
    }
    assert reference(schema).splitlines() == [
        "### `recipe`",
        "",
        "All.",
        "",
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `things` | name → [mapping](#thingsname) | required |  |",
        "",
        "### `things.NAME`",
        "",
        "One.",
        "",
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `n` | whole number ≥ 1 | `2` |  |",
    ]


def test_the_rooms_are_those_of_the_code() -> None:
    (tree,) = re.findall(r"^```\n(pipeline/.*?)^```", (DOCS / "architecture.md").read_text(), re.DOTALL | re.MULTILINE)
    rooms: dict[str, list[str]] = {}
    for floor, room in re.findall(r"^(?:(\w+)/| +(\w+)/)", tree, re.MULTILINE):
        if floor:
            current = rooms.setdefault(floor, [])
        else:
            current.append(room)
    assert rooms == {floor: [room for room in listed if room] for floor, listed in ROOMS.items()}
