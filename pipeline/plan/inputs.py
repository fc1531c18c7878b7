"""The models and data that a recipe names, resolved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sensmerge.pipeline.plan.opened import Opened
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.checkpoints.weights import BaseWeights, ExpertWeights

if TYPE_CHECKING:  # transformers takes seconds, which a merge of weights alone does not wait for
    from sensmerge.pipeline.plan.rows import TaskRows
    from sensmerge.tasks.networks.base import Base
    from sensmerge.tasks.networks.expert import Expert


class Networks(NamedTuple):
    """Base and experts, read by classes of transformers."""

    base: "Base"
    experts: "Mapping[str, Expert]"


@dataclass(frozen=True)
class Inputs(Opened):
    """All that a recipe names from outside."""

    listings: Mapping[str, Listing]
    """of base and experts by name"""
    data: "Mapping[str, TaskRows]"

    @property
    def networks(self) -> Networks:
        """Base and experts as networks, of a recipe with tasks."""
        from sensmerge.tasks.networks.base import Base  # see above
        from sensmerge.tasks.networks.expert import Expert

        experts = {name: one for name, one in self.experts.items() if isinstance(one, Expert)}
        assert isinstance(self.base, Base), "there are tasks, so networks are opened"
        return Networks(self.base, experts)

    def only_weights(self) -> tuple[BaseWeights, dict[str, ExpertWeights]]:
        """Return base and experts as far as merging needs to know them: small, and read without transformers."""
        base = self.base.only_weights()
        return base, {name: expert.only_weights(base) for name, expert in self.experts.items()}
