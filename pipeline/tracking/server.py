"""Whether an MLflow server answers."""

from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from sensmerge.tasks.errors import InputError


def check_http(uri: str) -> None:
    """Raise InputError unless an MLflow server answers at `uri`; see `pipeline.tracking.uri.check_server`."""
    remedy = "start it (mlflow server …) or pass --tracking-uri"
    try:
        response = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            max_retries=0,
            timeout=5,
            raise_on_status=False,
            params={"max_results": 1},
        )
    except MlflowException as error:
        raise InputError(f"MLflow server unreachable at {uri}: {remedy}") from error
    if response.status_code != 200:
        raise InputError(
            f"MLflow server unreachable at {uri}: it answered {response.status_code} {response.reason}; "
            f"check the address and MLFLOW_TRACKING_USERNAME, or {remedy}"
        )
