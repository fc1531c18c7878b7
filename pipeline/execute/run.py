"""Executes plans on Ray: resources, retries of system failures, progress."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import ray
from ray.util import metrics as ray_metrics
from rich.console import Console
from rich.filesize import decimal

from sensmerge.pipeline.execute.begun import forget
from sensmerge.pipeline.execute.cluster import SYSTEM_RETRIES, answer_of, cluster, room_for
from sensmerge.pipeline.execute.nodes import LOST, Disks, alive, is_gone, on_node, with_room
from sensmerge.pipeline.execute.pieces import Around, Piece, Pieces, Running, Strand
from sensmerge.pipeline.execute.progress import progress
from sensmerge.pipeline.execute.reads import check, do_part, finish, look_at_result, paths_in, send
from sensmerge.pipeline.execute.worker import Done
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.tasks.checkpoints.views import TOKENIZERS, VIEWS
from sensmerge.tasks.errors import InputError

if TYPE_CHECKING:  # with transformers they take seconds, which Ray's start does not wait for
    from sensmerge.pipeline.plan.plan import Plan
    from sensmerge.pipeline.plan.step import Step

# One remote function for all steps: Ray takes calls of one function in their order, those of several in any.
_CHECK, _PART, _SEND, _FINISH = (ray.remote(one) for one in (check, do_part, send, finish))
SECONDS_BOUNDS = [1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0]
"""Of the histogram of steps' times."""
LOOK_AT_WORK = 1.0
"""Seconds between two looks at which steps have begun, if nothing ends meanwhile."""
LOOK_AGAIN = 15.0
"""Seconds between two looks at which nodes a cluster has."""
TAGS = ("recipe", "stage")
"""Of Ray's metrics."""


class StepMetrics:
    """`ray_sensmerge_steps_total`, `ray_sensmerge_bytes_total` and `ray_sensmerge_step_seconds`, by recipe and stage.

    Ray collects them every 10 seconds.
    """

    def __init__(self, recipe: str) -> None:
        """Begin to count; Ray is connected."""
        self._recipe = recipe
        self._steps = ray_metrics.Counter("sensmerge_steps", "Steps that have ended well.", TAGS)
        self._bytes = ray_metrics.Counter("sensmerge_bytes", "Bytes of their artifacts.", TAGS)
        self._seconds = ray_metrics.Histogram(
            "sensmerge_step_seconds", "Time of a step on the workers.", SECONDS_BOUNDS, TAGS
        )

    def count(self, step: Step, done: Done) -> None:
        """Count a step that has ended well."""
        tags = {"recipe": self._recipe, "stage": step.stage}
        self._steps.inc(1, tags)
        if done.bytes:
            self._bytes.inc(done.bytes, tags)
        self._seconds.observe(max(done.spent.seconds, 1e-3), tags)


def execute(
    plan: Plan,
    address: str | None,
    console: Console,
    count_steps: bool = False,
    wait: float = 0,
    on_end: Callable[[Step, Done], None] | None = None,
) -> None:
    """Run the steps that the store lacks.

    Args:
        plan: the plan.
        address: Ray cluster to use; None takes RAY_ADDRESS (as a Ray job has it) or starts Ray on this machine.
        console: where progress goes.
        count_steps: whether Ray's metrics count finished steps.
        wait: seconds that nodes with room for the steps may take to come, as those of a cluster that is starting.
        on_end: what is called with every step that has ended well; the next steps wait for it.

    Raises:
        InputError: bad input that a step found.
        StepError: a step failed otherwise, or its worker died `SYSTEM_RETRIES` + 1 times.
    """
    steps = [step for step in plan.steps if step.title in plan.todo]
    if not steps:
        return
    plan.write_rows()
    with cluster(address), progress(console, len(steps), "steps") as shown:
        _wait_for_room(plan, steps, wait, console)
        metrics = StepMetrics(plan.recipe.name) if count_steps else None
        disks = Disks(plan.store)
        if disks.are_apart():
            _check_apart(steps)
        limits = {step.stage: plan.recipe.resources_of(step.stage).max_in_flight for step in steps}
        pieces = Pieces(steps, plan.store, limits, plan.steps, disks.are_apart)
        flying: dict[ray.ObjectRef, tuple[Running, Strand, Piece]] = {}
        while pieces.is_active():
            for taken in pieces.take():
                flying[_submit(plan, *taken)] = taken
            ended, _ = ray.wait(list(flying), num_returns=1, timeout=LOOK_AT_WORK)
            shown.at_work(*pieces.at_work())
            if not ended:
                continue
            (ready,) = ended
            state, strand, piece = flying.pop(ready)
            if _begins_again(pieces, state, strand, ready, flying):
                what = state.step.title if strand.bundle is None else f"{state.step.title}, {strand.bundle}"
                console.print(f"{what}: its node left; it begins again on another", highlight=False)
                continue
            result = answer_of(ready, state.step.title, _advice(plan, state.step.stage), list(flying))
            pieces.piece_done(state, strand, piece, result)
            if piece is Around.FINISH:
                look_at_result(plan.store, state.step.key, pieces.run)
                shown.advance(f"{plan.recipe.name}: {step_line(state.step, result)}")
                if on_end is not None:
                    on_end(state.step, result)
                if metrics is not None:
                    metrics.count(state.step, result)
        forget(pieces.run)


def _begins_again(
    pieces: Pieces,
    state: Running,
    strand: Strand,
    ended: ray.ObjectRef[Done],
    flying: dict[ray.ObjectRef, tuple[Running, Strand, Piece]],
) -> bool:
    """Have a strand begin again if a piece of it has ended since the node with what the others left is gone."""
    if strand.node is None or strand.nodes_lost == LOST or not is_gone(ended, strand.node):
        return False
    others = [ref for ref, (_, other, _) in flying.items() if other is strand]
    for ref in others:
        ray.cancel(ref)
        del flying[ref]
    pieces.begin_again(state, strand, 1 + len(others))
    return True


def step_line(step: Step, done: Done) -> str:
    """Return what is said of a finished step: its name and fingerprint, where it ran and what it took."""
    spent = done.spent
    text = (
        f"{step.title} ({step.key.fingerprint[:8]}) on {done.node}: {spent.seconds:.1f} s, "
        f"{decimal(done.bytes)}, {decimal(spent.peak_memory)} peak memory"
    )
    if spent.pieces_run < spent.pieces:
        text += f", {spent.pieces_run} of {spent.pieces} pieces, the others were done before"
    if done.result.get("taken_over"):
        size, whole = (decimal(done.result[key]) for key in ("taken_over_bytes", "tensor_bytes"))
        text += f", {done.result['taken_over']} of {done.result['tensors']} tensors taken over ({size} of {whole})"
    return text


def _advice(plan: Plan, stage: Stage) -> str:
    """Return what to do about a worker of a stage that runs out of memory."""
    if stage == "calibrate":
        return "lower resources.calibrate.num_cpus (fewer experts at once) or max_in_flight"
    fewer = f"raise resources.{stage}.num_cpus (fewer at once) or lower max_in_flight"
    if stage in plan.placements and plan.placements[stage].placement == "whole":
        return f"set placement: streamed, or {fewer}"
    return fewer


def _submit(plan: Plan, state: Running, strand: Strand, piece: Piece) -> ray.ObjectRef[Done]:
    """Hand a piece to Ray; of nodes with disks apart, any takes the first piece of a strand, and then all others."""
    step, bundle = state.step, strand.bundle
    resources = plan.recipe.resources_of(step.stage)
    if piece is Around.CHECK and state.apart:
        _check_apart([step])
        if step.actors:
            # Ray does not choose: those that would have to make room may be actors of a try whose node has left.
            strand.node = random.choice(with_room(resources.wanted) or alive())
    threads = max(1, int(resources.num_cpus))
    options = {
        # A step with actors waits for them: what it held meanwhile they might lack.
        "num_cpus": 0 if step.actors else resources.num_cpus,
        "num_gpus": 0 if step.actors else resources.num_gpus,
        "resources": {} if step.actors else resources.custom,
        "max_retries": SYSTEM_RETRIES,
        "retry_exceptions": False,
        "name": step.title,
        "scheduling_strategy": "DEFAULT" if strand.node is None else on_node(strand.node),
    }
    partial = plan.store.partial(step.key, None if bundle is None else bundle.number)
    if piece is Around.CHECK:
        # The node that can do it must be able to do the other pieces too, if these have to follow.
        if not state.apart:
            options |= {"num_gpus": 0, "resources": {}}
        elif strand.node is None:
            options |= {"scheduling_strategy": "SPREAD"}
        return _CHECK.options(**options).remote(state.reads, state.job, partial)
    if piece is Around.SEND:
        return _SEND.options(**options).remote(state.reads, state.job, step.key, bundle, threads)
    if piece is Around.FINISH:
        words = (state.reads, state.job, step.key, state.spent, threads, state.in_bundles)
        return _FINISH.options(**options).remote(*words)
    return _PART.options(**options).remote(state.reads, state.job, piece, partial, threads)


def _check_apart(steps: list[Step]) -> None:
    """Refuse what only nodes with a disk in common can do."""
    for step in steps:
        written = [path for path in paths_in(step.job) if {VIEWS, TOKENIZERS} & {*path.parts}]
        if written:
            raise InputError(
                f"{step.title} reads {written[0]}, which this machine has written, since models have different tokens "
                "or are vision towers; let SENSMERGE_CACHE be on storage that all nodes see"
            )


def _wait_for_room(plan: Plan, steps: list[Step], wait: float, console: Console) -> None:
    """Wait until the cluster has nodes for all steps, which its autoscaler is asked for; after so many seconds, refuse.

    Ray itself takes work that no node has room for, and waits for ever where none comes.
    """
    from ray.autoscaler.sdk import request_resources  # takes a while to import

    end, is_asked = time.monotonic() + wait, False
    try:
        while True:
            try:
                return _check_resources(plan, steps)
            except InputError as error:
                left = end - time.monotonic()
                if left <= 0:
                    raise
                if not is_asked:
                    request_resources(bundles=_least_room(plan, steps))
                    is_asked = True
                console.print(f"waiting for nodes, {left:.0f} s more: {error}", highlight=False, soft_wrap=True)
                time.sleep(min(left, LOOK_AGAIN))
    finally:
        if is_asked:
            request_resources(bundles=[])  # from now on work asks by waiting


def _least_room(plan: Plan, steps: list[Step]) -> list[dict[str, float]]:
    """Return what the cluster has to have at once: a worker for any stage, and all actors of a step that has some."""
    most: Counter[tuple[tuple[str, float], ...]] = Counter()
    for step in steps:
        wanted = plan.recipe.resources_of(step.stage).wanted
        most |= Counter({tuple(wanted.items()): max(1, step.actors)})
    return [dict(wanted) for wanted in most.elements()]


def _check_resources(plan: Plan, steps: list[Step]) -> None:
    """Refuse a recipe that asks for more than any node has: Ray would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    way_out = "lower them, use another --address, or give nodes time to come with --wait"
    for step in steps:
        wanted = plan.recipe.resources_of(step.stage).wanted
        room = room_for(wanted)
        if step.actors > room:
            raise InputError(
                f"placement.actors is {step.actors}; the cluster has room for {room} with {_said(wanted)} each "
                f"(resources.{step.stage}); {way_out}"
            )
    for stage in dict.fromkeys(step.stage for step in steps):
        wanted = plan.recipe.resources_of(stage).wanted
        if not with_room(wanted):
            largest = {name: max(node.get(name, 0) for node in nodes) for name in {"CPU": 0, "GPU": 0} | wanted}
            raise InputError(
                f"resources.{stage}: a step asks for {_said(wanted)}, the largest node has {_said(largest)}; {way_out}"
            )


def _said(amounts: Mapping[str, float]) -> str:
    """Return what a step takes of a node, or what nodes have, as messages say it."""
    usual = [f"{amounts.get(name, 0):g} {name}s" for name in ("CPU", "GPU")]
    others = [f"{amount:g} {name}" for name, amount in amounts.items() if name not in ("CPU", "GPU")]
    *first, last = [*usual, *others]
    return f"{', '.join(first)} and {last}"
