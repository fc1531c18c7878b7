"""Which statistics a recipe needs of its experts."""

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.statistics.statistic import STATISTICS, Statistic


def wanted_statistics(recipe: Recipe) -> dict[str, Statistic]:
    """Return by name what the variants of a recipe need: one pass over each calibration set measures all of them.

    Raises:
        InputError: a method needs a statistic that no package has.
    """
    names = {"sensitivity"} if recipe.sens_variants() else set()
    for variant, settings in recipe.merges.items():
        for name in settings.method.statistics:
            if name not in STATISTICS:
                raise InputError(
                    f"merges.{variant}.method: {settings.method.name} needs the statistic {name}; found "
                    f"{', '.join(STATISTICS)}; install the package that registers it"
                )
            names.add(name)
    return {name: STATISTICS[name]() for name in sorted(names)}
