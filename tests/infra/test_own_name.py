"""What is installed is the package and nothing else. That it runs beside a user's own `tasks.py` is in test_job.py."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def test_every_module_is_installed_and_no_test(installed: Path) -> None:
    modules = (path for floor in ("pipeline", "tasks") for path in (PROJECT / floor).rglob("*.py"))
    ours = {str(path.relative_to(PROJECT)) for path in modules}
    package = installed / "sensmerge"
    assert {str(path.relative_to(package)) for path in package.rglob("*.py")} == {"__init__.py", *ours}
    assert {path.name for path in installed.iterdir()} == {"bin", "sensmerge", "sensmerge-0.1.0.dist-info"}
