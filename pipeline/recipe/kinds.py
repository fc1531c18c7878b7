"""The tasks of a recipe, each read by the class that its `kind` names."""

from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from sensmerge.tasks.kinds.kind import KINDS, Task


class _ByKind:
    """Marks a task that is of any registered kind: those that are known when a recipe is read."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_read)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kinds: Any = None
        for kind in KINDS.values():
            kinds = kind if kinds is None else kinds | kind
        return handler(TypeAdapter(Annotated[kinds, Field(discriminator="kind")]).core_schema)


AnyTask = Annotated[Task, _ByKind]


def _read(value: Any) -> Task:
    """Return a task; errors of its class keep their place in the recipe."""
    if isinstance(value, Task):
        return value
    if not isinstance(value, dict):
        raise PydanticKnownError("model_attributes_type")
    if "kind" not in value:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
    name = value["kind"]
    if not isinstance(name, str) or name not in KINDS:
        context = {"discriminator": "'kind'", "tag": str(name), "expected_tags": ", ".join(map(repr, KINDS))}
        raise PydanticKnownError("union_tag_invalid", context)
    return KINDS[name].model_validate(value)
