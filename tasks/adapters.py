"""What a recipe says of a merge that is to be an adapter."""

from typing import Annotated

from pydantic import Field

from sensmerge.tasks.strict import Strict, mapping


class AdapterSettings(Strict):
    """The merge of adapters as an adapter of their base, in place of whole weights."""

    rank: int | None = Field(
        None,
        ge=1,
        le=2**17,
        description="of its factors: the nearest matrices of that rank, by singular vectors; left out: exact, with the "
        "sum of the experts' ranks, by methods that sum whole task vectors",
    )


AdapterOutput = Annotated[AdapterSettings | None, mapping("{rank: 16}")]
"""A key that is left out where the merge is whole weights."""
