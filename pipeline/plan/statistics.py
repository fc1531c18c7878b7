"""Which statistics a recipe needs of its experts."""

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.tasks.statistics.statistic import STATISTICS, Statistic


def wanted_statistics(recipe: Recipe) -> dict[str, Statistic]:
    """Return by name what the variants of a recipe need: one pass over each calibration set measures all of them."""
    names = {"sensitivity"} if recipe.sens_variants() else set()
    return {name: STATISTICS[name]() for name in sorted(names)}
