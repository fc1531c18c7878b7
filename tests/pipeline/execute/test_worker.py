"""What a worker has to import before it can begin; a fresh one starts for every run, and often for every stage."""

import subprocess
import sys
from pathlib import Path

import pytest

STAGES = "sensmerge.tasks.stages"
NEVER = {"ray", "mlflow", "datasets", "pandas", "peft", "sklearn", "matplotlib", "typer"}
"""What no step needs before it knows its models: peft is imported for adapters only."""
NETWORKS = {"transformers", "accelerate", "tokenizers"}


def printed(program: str) -> str:
    """What a program prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        (["sensmerge.pipeline.execute.worker"], NEVER | NETWORKS | {"torch", "numpy", "numba"}),
        ([f"{STAGES}.download"], NEVER | NETWORKS | {"torch", "numba"}),
        ([f"{STAGES}.task_vectors", f"{STAGES}.merge"], NEVER | NETWORKS),
        ([f"{STAGES}.statistics", f"{STAGES}.cross_task", f"{STAGES}.route", f"{STAGES}.evaluate"], NEVER),
    ],
    ids=["worker", "download", "merge", "networks"],
)
def test_a_step_imports_what_it_needs(modules: list[str], unwanted: set[str]) -> None:
    program = f"import sys, {', '.join(modules)}\nprint(sorted({unwanted!r} & sys.modules.keys()))"
    assert printed(program) == "[]\n"


def test_a_download_runs_without_torch(llamas: dict[str, Path], tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from sensmerge.pipeline.execute.worker import Spent, run_finish
from sensmerge.pipeline.store.store import Key, Store
from sensmerge.tasks.checkpoints.listing import LocalModel
from sensmerge.tasks.checkpoints.source import resolve
from sensmerge.tasks.stages.download import DownloadJob

here = Path({str(tmp_path)!r})
job = DownloadJob(resolve(LocalModel(Path({str(llamas["base"])!r})), here), here)
done = run_finish(job, Store(here), Key.of("base", job), Spent(), 1)
print(done.result["bytes"] > 0, "torch" in sys.modules)
"""
    assert printed(program) == "True False\n"
