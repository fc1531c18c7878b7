import sys
from importlib import import_module
from pathlib import Path

import pytest

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.registry import Registry


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a module that registers a class, and an inner package that does not count."""
    package = tmp_path / "some_room"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py"):
        (package / name).touch()
    (package / "inner" / "__init__.py").write_text("raise AssertionError\n")
    (package / "contract.py").write_text(
        "from sensmerge.tasks.registry import Registry\nTHINGS = Registry('no.such.group', 'some_room')\n"
    )
    (package / "one.py").write_text(
        "from some_room.contract import THINGS\n@THINGS.register('one')\nclass One:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "some_room"


def test_the_modules_of_the_room_are_found(room: str) -> None:
    from some_room.contract import THINGS

    assert list(THINGS) == ["one"]
    assert THINGS["one"].__name__ == "One"
    assert "two" not in THINGS
    for name in [name for name in sys.modules if name.startswith(room)]:
        del sys.modules[name]


def test_the_order_does_not_depend_on_what_is_imported_first(room: str, tmp_path: Path) -> None:
    module = "from some_room.contract import THINGS\n@THINGS.register({0!r})\nclass Thing:\n    pass\n"
    (tmp_path / room / "two.py").write_text(module.format("two"))
    (tmp_path / "elsewhere.py").write_text(module.format("far"))
    import_module("elsewhere")
    import_module(f"{room}.two")
    from some_room.contract import THINGS

    assert list(THINGS) == ["one", "two", "far"]
    for name in [name for name in sys.modules if name.startswith((room, "elsewhere"))]:
        del sys.modules[name]


def test_a_name_has_one_class() -> None:
    registry: Registry[object] = Registry("no.such.group", "json")

    @registry.register("one")
    class One:
        pass

    with pytest.raises(ValueError, match="both register 'one'"):

        @registry.register("one")
        class Other:
            pass

    assert registry["one"] is One


@pytest.mark.parametrize("module", ["raise RuntimeError('no licence')\n", "import a_module_that_is_not_there\n"])
def test_a_package_that_cannot_be_loaded_is_named(
    module: str, room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(module)
    about = tmp_path / "broken_package-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-package\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[some.group]\nbroken = broken\n")
    registry: Registry[object] = Registry("some.group", room)
    with pytest.raises(InputError, match=r"^the package broken-package, .* entry point broken of some\.group raises"):
        list(registry)
    for name in [name for name in sys.modules if name.startswith((room, "broken"))]:
        del sys.modules[name]
