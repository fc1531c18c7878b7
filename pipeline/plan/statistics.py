"""Which statistics a recipe needs of its experts."""

from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.coefficients import SensCoefficients
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.statistics.statistic import STATISTICS, Statistic


def wanted_statistics(recipe: Recipe) -> dict[str, Statistic]:
    """Return by name what the variants of a recipe need: one pass over each calibration set measures all of them.

    Raises:
        InputError: a method needs a statistic that no package has.
    """
    names = set()
    for variant, settings in recipe.merges.items():
        for name in statistics_of(settings):
            if name not in STATISTICS:
                raise InputError(
                    f"merges.{variant}.method: {settings.method.name} needs the statistic {name}; found "
                    f"{', '.join(STATISTICS)}; install the package that registers it"
                )
            names.add(name)
    return {name: STATISTICS[name]() for name in sorted(names)}


def statistics_of(variant: Variant) -> list[str]:
    """Return the names of what a variant needs to know of each expert."""
    sens = ["sensitivity"] if isinstance(variant.coefficients, SensCoefficients) else []
    return [*sens, *variant.method.statistics]


def takes_losses(recipe: Recipe) -> str | None:
    """Return the key of a variant for which losses are taken on calibration rows, in words; None if there is none."""
    for name, variant in recipe.merges.items():
        taken = [one for one in statistics_of(variant) if one in STATISTICS and STATISTICS[one].hook == "gradients"]
        if taken:
            return f"merges.{name} (statistic {taken[0]})"
    return None
