"""Which version a refresh makes champion: the best variant that may be it, if the gate lets it pass."""

from sensmerge.pipeline.plan.plan import Plan
from sensmerge.pipeline.recipe.gate import Gate
from sensmerge.pipeline.report.gate import best_variant, candidates, is_held_out, judge, passes, worth
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.tracking.registry import ModelRegistry, loss_of_champion


def choose_champion(plan: Plan, report: Report, uri: str) -> tuple[bool, list[str]]:
    """Propose the best variant and promote it if it passes; return whether it did, and what is to be said of it.

    A champion whose weights are gone is judged like any other, for MLflow has what it answered: nothing worse than it
    becomes champion unasked. What is lost is said, and stays for users to decide where no variant passes.

    Args:
        plan: of a run that has ended and is recorded.
        report: of that run.
        uri: where it is recorded.
    """
    gate, loss = plan.recipe.gate, loss_of_champion(plan.recipe.name, plan.store, uri)
    said = [] if loss is None else [loss]
    if not report.tasks:
        return True, [*said, "no task has evaluation samples, so there is no champion"]
    if not candidates(report, gate):
        names = ", ".join(report.routes)
        return loss is None, [*said, f"there is no static variant; name {names} in gate.variants to get a new champion"]
    registry, best = ModelRegistry(uri, plan.recipe.name), best_variant(report, gate)
    said += _better_ones(report, gate, best)
    version, champion = registry.of_variant(report, best), registry.champion()
    if (gone := plan.store.lacking(version.folder)) is not None:
        return False, [*said, f"{version} is the best variant, and cannot become champion: {gone}"]
    if champion is None:
        registry.promote(version)
        return True, [*said, f"{version} is the first champion: {worth(report, gate, best)}"]
    if champion.number == version.number:
        return True, [*said, f"{version} stays champion: it is still the best variant"]
    held_out = is_held_out(report, gate)
    verdicts = judge(registry.outcomes(version), registry.outcomes(champion), gate.tolerance, held_out)
    registry.propose(version, champion, verdicts)
    said += [f"gate, {verdict.task}: {verdict}" for verdict in verdicts]
    if not passes(verdicts):
        name = f"{version.recipe}/{version.number}"
        remedy = "; more evaluation rows narrow the intervals, gate.tolerance allows more, and `sensmerge promote "
        remedy += f"{name}` skips the gate" if loss is None else f"{name}` gets a champion that loads"
        return False, [*said, f"{version} stays challenger, {champion} stays champion{remedy}"]
    registry.promote(version)
    return True, [*said, f"{version} is champion, replacing {champion}"]


def _better_ones(report: Report, gate: Gate, best: str) -> list[str]:
    """Say which dynamic variant scores better than the best of those that may become champion."""
    best_of_all = best_variant(report, gate.model_copy(update={"variants": list(report.variants)}))
    if gate.variants or best_of_all == best:
        return []
    return [
        f"{best_of_all} scores better than {best}; it is dynamic and becomes champion only if the recipe names it in "
        "gate.variants"
    ]
