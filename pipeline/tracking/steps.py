"""What MLflow is told of steps when they end: how many have, how long they took, and what models scored."""

from collections.abc import Mapping, Sequence

from mlflow.entities import Metric

from sensmerge.pipeline.tracking.client import connected
from sensmerge.pipeline.tracking.live import EndedStep
from sensmerge.pipeline.tracking.runs import OpenRun, open_model


def tell(uri: str, run: str, ended: Sequence[EndedStep], roles: Mapping[str, str], models: dict[str, str]) -> None:
    """Tell the run of an execution of steps, and the runs of models of their scores.

    Args:
        uri: where.
        run: of the execution.
        ended: in the order in which they ended.
        roles: model → base, expert or variant.
        models: model → its run; those that are opened here are added.
    """
    with connected(uri) as client:
        parent = OpenRun(client, client.get_run(run).info.experiment_id, run)
        client.log_batch(run, [one for step in ended for one in _metrics(step, step.metrics)])
        for step in ended:
            for model, scores in step.scores.items():
                if model not in models:
                    models[model] = open_model(parent, model, roles[model], step.at - step.seconds)
                client.log_batch(models[model], _metrics(step, scores))


def _metrics(step: EndedStep, values: Mapping[str, float]) -> list[Metric]:
    return [Metric(key, value, round(1000 * step.at), step.number) for key, value in values.items()]
