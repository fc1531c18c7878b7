"""A recipe from its listed models to scores, MLflow and model cards: what `run` and `refresh` have in common."""

import os
from collections.abc import Mapping, Sequence

import yaml
from rich.console import Console

from sensmerge.pipeline.execute.run import execute
from sensmerge.pipeline.options import Options
from sensmerge.pipeline.plan.changes import model_changes
from sensmerge.pipeline.plan.damage import with_damaged
from sensmerge.pipeline.plan.kept import Recorded, inputs_digest, keep
from sensmerge.pipeline.plan.plan import Plan, make_plan, plan_summary, plan_table
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.report.answers import answers
from sensmerge.pipeline.report.card import write_cards
from sensmerge.pipeline.report.gate import best_of
from sensmerge.pipeline.report.printed import print_results
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.report.results import collect, data_sets, outcomes
from sensmerge.pipeline.store.history import begin, has_passed, last_run, lasting_uri, remember
from sensmerge.pipeline.tracking.live import LiveRun
from sensmerge.pipeline.tracking.system_metrics import Load, sampled
from sensmerge.pipeline.webhook import send_refusal
from sensmerge.tasks.artifacts import write_json
from sensmerge.tasks.checkpoints.listing import Listing
from sensmerge.tasks.errors import InputError, StepError
from sensmerge.tasks.urls import public_text


def run(options: Options, listings: Mapping[str, Listing], console: Console) -> bool:
    """Run what the store lacks, print and record the result.

    Args:
        options: what to run; its store is locked, and runs can be recorded.
        listings: the recipe's models, from `list_models`.
        console: where progress and results go.

    Returns:
        True: nothing is refused.

    Raises:
        InputError: bad input.
        StepError: a step failed, or MLflow.
    """
    made_from = inputs_digest(options.recipe, options.folder, options.store, listings)
    plan, damage = with_damaged(make_plan(options.recipe, options.folder, options.store, listings))
    for line in (*plan.inputs.notes, *damage, plan_summary(plan)):
        console.print(line, highlight=False, soft_wrap=True)
    begin(plan.store, plan.recipe.name, "run", plan.keys(), options.tracking_uri)
    report, recorded = _work(options, plan, console)
    _remember_run(options, plan, made_from, recorded, console)
    _free_losers(plan, report, console)
    return True


def record(options: Options, listings: Mapping[str, Listing], console: Console) -> bool:
    """Print and record the result of a run that MLflow was not told of, because it failed then. Run nothing.

    The gate is a refresh's: the next one passes it.

    Args:
        options: what to record; its store is locked, and runs can be recorded.
        listings: the recipe's models, from `list_models`.
        console: where results go.

    Returns:
        True: nothing is refused.

    Raises:
        InputError: bad input, or the store lacks the results of some steps.
        StepError: MLflow failed again.
    """
    made_from = inputs_digest(options.recipe, options.folder, options.store, listings)
    plan = make_plan(options.recipe, options.folder, options.store, listings)
    for title, why in plan.todo.items():
        raise InputError(
            f"{plan.recipe.name}: the store lacks {len(plan.todo)} of {len(plan.steps)} steps, such as {title} "
            f"({why}); `record` runs none: `run` or `refresh` does, and records them"
        )
    for line in plan.inputs.notes:
        console.print(line, highlight=False, soft_wrap=True)
    report, recorded = _finish(options, plan, (), console)
    _remember_run(options, plan, made_from, recorded, console)
    _free_losers(plan, report, console)
    return True


def _remember_run(options: Options, plan: Plan, made_from: str | None, recorded: Recorded, console: Console) -> None:
    """Keep the plan of a run that has ended and is recorded, and say where."""
    keep(plan, options.folder, made_from, recorded)
    remember(plan.store, plan.recipe.name, "run", plan.lasting_keys(), options.tracking_uri)
    _say_where(options, recorded, console)


def refresh(options: Options, listings: Mapping[str, Listing], console: Console) -> bool:
    """Run what changed since the last time, and let the best variant become champion if it is not worse.

    Where nothing changed that is said, and everything left as it is, unless the champion's weights are gone.

    Args:
        options: what to run; its store is locked, and runs can be recorded.
        listings: the recipe's models as they are now, from `list_models`.
        console: where progress and results go.

    Returns:
        Whether the gate has passed the best variant, now or before.

    Raises:
        InputError: bad input.
        StepError: a step failed, or MLflow.
    """
    made_from = inputs_digest(options.recipe, options.folder, options.store, listings)
    plan, damage = with_damaged(make_plan(options.recipe, options.folder, options.store, listings))
    last = None if plan.todo else last_run(plan.store, plan.recipe.name, plan.keys())
    if last is not None:
        console.print(f"{plan.recipe.name}: nothing changed", highlight=False)
        report = collect(plan)
        if options.report is not None:
            write_json(options.report, report.model_dump())
        from sensmerge.pipeline.tracking.registry import loss_of_champion

        keep(plan, options.folder, made_from)
        # What a `run` has made has not passed this gate yet; and a champion that is lost has to be replaced.
        loss = loss_of_champion(plan.recipe.name, plan.store, options.uri)
        passed = has_passed(plan.store, plan.recipe.name, plan.keys(), plan.recipe.gate.text())
        return (passed and loss is None) or _pass_gate(options, plan, report, console)
    for line in (*plan.inputs.notes, *model_changes(plan), *damage, plan_summary(plan)):
        console.print(line, highlight=False, soft_wrap=True)
    begin(plan.store, plan.recipe.name, "refresh", plan.keys(), options.tracking_uri)
    report, recorded = _work(options, plan, console)
    keep(plan, options.folder, made_from, recorded)
    _say_where(options, recorded, console)
    passed = _pass_gate(options, plan, report, console, recorded.mlflow_run)
    _free_losers(plan, report, console)
    return passed


def _free_losers(plan: Plan, report: Report, console: Console) -> None:
    """Free what the recipe does not keep, now that all that came of it is recorded."""
    if plan.recipe.disposable():
        from sensmerge.pipeline.tracking.disposal import free_losers

        for line in free_losers(plan, report):
            console.print(line, highlight=False, soft_wrap=True)


def _pass_gate(options: Options, plan: Plan, report: Report, console: Console, run: str | None = None) -> bool:
    """Let the best variant become champion if it may, say what came of it, and return whether it has passed."""
    from sensmerge.pipeline.tracking.champion import choose_champion

    try:
        passed, said = choose_champion(plan, report, options.uri)
        if run is not None:
            from sensmerge.pipeline.tracking.record import log_verdict

            log_verdict(options.uri, run, passed, said)
    except StepError as error:
        raise StepError(f"{error}; the run is recorded, but has not passed the gate: refresh again") from error
    if not passed and options.webhook is not None:
        trouble = send_refusal(options.webhook, plan.recipe.name, said)
        said += [] if trouble is None else [trouble]
    for line in said:
        console.print(line, highlight=False, soft_wrap=True)
    remember(
        plan.store, plan.recipe.name, "refresh", plan.lasting_keys(), options.tracking_uri, plan.recipe.gate.text()
    )
    return passed


def _work(options: Options, plan: Plan, console: Console) -> tuple[Report, Recorded]:
    """Run the steps, print what they found, and record it in a run of MLflow that is there from the start."""

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    with LiveRun(options.uri, plan, (recipe_yaml(plan.recipe), plan_text(plan)), say) as live:
        return _finish(options, plan, _execute(options, plan, live, console), console, live)


def _execute(options: Options, plan: Plan, live: LiveRun, console: Console) -> Sequence[Load]:
    """Run the steps, and return the load of this machine meanwhile if it is wanted."""
    if not options.metrics:
        execute(plan, options.address, console, wait=options.wait, on_end=live.step_ended)
        return ()
    with sampled() as samples:
        execute(plan, options.address, console, count_steps=True, wait=options.wait, on_end=live.step_ended)
    return samples


def _finish(
    options: Options, plan: Plan, load: Sequence[Load], console: Console, live: LiveRun | None = None
) -> tuple[Report, Recorded]:
    """Write cards and report, print the tables, and record the run."""
    plan.store.look()
    report = collect(plan)
    text = recipe_yaml(plan.recipe)
    write_cards(plan, report, text)
    _write_mlflow_files(plan, report)
    if options.report is not None:
        write_json(options.report, report.model_dump())
    print_results(report, plan.recipe.gate, len(plan.inputs.notes), console)
    from sensmerge.pipeline.tracking.record import Execution, record

    best = best_of(report, plan.recipe.gate)
    execution = Execution(report, outcomes(plan), text, plan_text(plan), data_sets(plan), load, answers(plan), best)
    opened, models = (None, None) if live is None else live.opened()
    try:
        run = record(execution, options.uri, plan.store.root, opened, models)
    except StepError as error:
        raise StepError(
            f"{error}; the results are in the store: `sensmerge record`, with the recipe and the options of this "
            "command, records them"
        ) from error
    found = report.found_again().model_dump(mode="json")
    return report, Recorded(found, lasting_uri(options.tracking_uri), run)


def _say_where(options: Options, recorded: Recorded, console: Console) -> None:
    """Say where people find a run, once nothing of it can be lost any more."""
    from sensmerge.pipeline.tracking.runs import where_recorded

    where = where_recorded(options.uri, recorded.mlflow_run)
    if where is not None:  # somebody may have deleted it meanwhile
        console.print(f"MLflow: {where}", highlight=False, soft_wrap=True)


def _write_mlflow_files(plan: Plan, report: Report) -> None:
    """Write what MLflow loads a model by beside its weights, where these are at a URL that MLflow reads."""
    if plan.store.remote is None:
        return
    from sensmerge.pipeline.tracking.load import MLMODEL, NEEDED, Merged, write_beside

    for name in plan.recipe.merges:
        merged = Merged.of(report, name)
        if merged.answers and merged.is_read_by_mlflow and not (merged.folder / MLMODEL).is_file():
            plan.store.fetch(plan.step(plan.recipe.merges[name].last_stage, name).key, NEEDED)
            plan.store.upload(merged.folder, *write_beside(merged))


def recipe_yaml(recipe: Recipe) -> str:
    """Return a recipe, overrides applied, as YAML that says no more than was set, and no password in URLs."""
    dumped = recipe.model_dump(by_alias=True, exclude_unset=True)
    return public_text(yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True))


def plan_text(plan: Plan) -> str:
    """Return the plan as lines."""
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(plan_table(plan))
    return console.export_text()
