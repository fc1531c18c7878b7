"""The steps of a recipe: which there are, in an order in which each comes after those it needs."""

from sensmerge.pipeline.plan.idle import without_idle
from sensmerge.pipeline.plan.layout import Layout
from sensmerge.pipeline.plan.step import Resolved, Step


def lay_out(resolved: Resolved) -> tuple[list[Step], dict[str, str]]:
    """Return all steps of a recipe, each after those it needs, and which of them makes what, by title.

    Steps of two variants that would make the same, such as the merge of a static variant and that of a dynamic one on
    top of it, are one step. One that the store has done for a variant of another name is not done again.
    """
    layout = _layout(resolved)
    layout.inputs()
    layout.measures()
    layout.merges()
    layout.uses()
    return without_idle(layout.steps, resolved.store), layout.makers


def _layout(resolved: Resolved) -> Layout:
    if not resolved.recipe.tasks:
        return Layout(resolved)
    from sensmerge.pipeline.plan.network_layout import NetworkLayout  # transformers takes seconds

    return NetworkLayout(resolved)
