"""Arguments and options that several commands have in common."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking.uri import TRACKING_URI
from sensmerge.pipeline.webhook import WEBHOOK

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see `schema` for its keys")]
StoreOption = Annotated[
    Store,
    typer.Option(
        "--store", metavar="DIR", parser=Store.open, help="folder for all artifacts, or a URL such as s3://bucket/team"
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override one value of the recipe; repeatable")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        metavar="URI",
        envvar=TRACKING_URI,
        show_envvar=False,
        help=f"MLflow server or database; default: {TRACKING_URI}, else mlflow.db in the store",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="RAY", help="Ray cluster; default: RAY_ADDRESS, else Ray on this machine"),
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait",
        metavar="SECONDS",
        min=0,
        help="how long to wait for another run on the same store, and for nodes of the cluster to come",
    ),
]
MetricsOption = Annotated[
    bool,
    typer.Option(
        "--metrics", help="count steps in Ray's metrics (Prometheus) and record this machine's load in MLflow"
    ),
]
CronOption = Annotated[
    str | None,
    typer.Option(
        "--cron", metavar="CRON", help='keep running and refresh at these times: "0 3 * * *" is daily at 3:00'
    ),
]
TimezoneOption = Annotated[
    str | None,
    typer.Option("--timezone", metavar="ZONE", help="time zone for --cron, such as Europe/Berlin; default: UTC"),
]
RefusedOption = Annotated[
    int,
    typer.Option(
        "--refused-exit-status",
        metavar="STATUS",
        min=0,
        max=125,
        help="exit status if the best variant does not pass the gate; 0 for schedulers that take others for a failure",
    ),
]
WebhookOption = Annotated[
    str | None,
    typer.Option(
        "--webhook",
        metavar="URL",
        envvar=WEBHOOK,
        show_envvar=False,
        help=f"address that is told, by POST, if the best variant does not pass the gate; default: {WEBHOOK}",
    ),
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="write the results to this file as JSON")
]

REFUSED = 3
"""Exit status of a refresh whose challenger is not shown to be as good as the champion, where no other is asked for."""
DEFAULT_STORE: Any = "store"  # parsed as what the user gives
