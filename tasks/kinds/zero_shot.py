"""What a zero-shot classifier is told of its classes: their names, and texts that these stand in."""

from pydantic import Field, field_validator

from sensmerge.tasks.strict import Strict

PLACE = "{}"
"""Where the name of a class stands in a template."""


class ZeroShot(Strict):
    """A head is made of the names of classes by CLIP's text tower, for an expert that has none."""

    classes: list[str] = Field(
        min_length=2, description="names of the classes, in the order of the numbers that rows have as labels"
    )
    templates: list[str] = Field(
        min_length=1,
        description="texts with {} where the name of a class stands; a class is where the mean of its texts lies",
    )

    @field_validator("classes")
    @classmethod
    def _apart(cls, names: list[str]) -> list[str]:
        for number, name in enumerate(names):
            if not name.strip():
                raise ValueError(f"name {number} is empty; expected the name of a class")
            if name in names[:number]:
                raise ValueError(
                    f"{name!r} stands for class {names.index(name)} and for class {number}; expected a name for each"
                )
        return names

    @field_validator("templates")
    @classmethod
    def _one_place(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count(PLACE) != 1:
                raise ValueError(
                    f"{template!r} has {template.count(PLACE)} of {{}}; expected one, where the name of a class goes"
                )
        return templates
