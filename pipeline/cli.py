"""The command line: its commands, and what becomes of errors."""

import atexit
import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from sensmerge.pipeline.cli_convert import export, extract, import_
from sensmerge.pipeline.cli_models import compare, predict, promote, rollback
from sensmerge.pipeline.cli_recipe import init, plan, record, refresh, run, schema
from sensmerge.pipeline.cli_store import collect_garbage, verify
from sensmerge.pipeline.execute.stop import Stopped
from sensmerge.tasks.errors import InputError, StepError, disk_trouble
from sensmerge.tasks.urls import public_text

# Commands import what they need themselves: --help and what reads no recipe do not wait for torch.

COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "plan": plan,
    "run": run,
    "refresh": refresh,
    "record": record,
    "predict": predict,
    "compare": compare,
    "promote": promote,
    "rollback": rollback,
    "verify": verify,
    "gc": collect_garbage,
    "import": import_,
    "export": export,
    "extract": extract,
    "schema": schema,
}
"""By name, in the order of --help."""

app = typer.Typer(
    name="sensmerge",
    help="Merge fine-tuned experts of one base model into one model, without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _say_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"sensmerge {version('sensmerge')}\n")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="print the version")
    ] = False,
) -> None:
    pass


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what nothing expected, as Python does, but without what is secret in URLs."""
    sys.stderr.write(public_text("".join(traceback.format_exception(kind, error, trace))))


def _keep_stack(error: BaseException) -> Path | None:
    """Write to a file what the line does not say; see `keep_stack`."""
    from sensmerge.pipeline.stack import keep_stack

    return keep_stack(error)


def main() -> None:
    """Run the command line: bad input is one line on standard error and exit status 2, a failed step exit status 1.

    What lies behind such a line, where something else failed, is in a file (`keep_stack`).
    Told to stop by a signal, it says so and exits with status 128 + number of the signal.
    """
    # Ray 2.60 warns at every task that it will one day leave CUDA_VISIBLE_DEVICES alone; this is the future behaviour.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # On its way out the interpreter would look through all modules for garbage, for more than a second.
    atexit.register(gc.freeze)
    sys.excepthook = _print_exception
    try:
        typer.main.get_command(app)()  # app() itself would have tracebacks printed by Python, whatever they show
    except InputError as error:
        _keep_stack(error)
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except StepError as error:
        stack = _keep_stack(error)
        sys.stderr.write(f"error: {error}{f' (its stack: {stack})' if stack else ''}\n")
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # the names that files of our own have are short
            sys.stderr.write(f"error: {InputError(f'{error.filename}: {error.strerror}; use a shorter path')}\n")
            sys.exit(2)
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        sys.stderr.write(f"error: {trouble}\n")
        sys.exit(1)
    except Stopped as stopped:
        sys.stderr.write(f"error: stopped by {stopped}; run it again to finish\n")
        sys.exit(stopped.exit_status)
