"""Where methods, statistics and kinds of task are found by name, those of other people's packages included."""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from sensmerge.tasks.errors import InputError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by name. The modules of a room, and entry points of a group, register theirs as they are imported.

    Both are imported with the first look at the registry.
    """

    def __init__(self, group: str, room: str) -> None:
        """Begin empty.

        Args:
            group: of entry points, such as `sensmerge.methods`; each names a module that registers classes.
            room: package whose modules register classes.
        """
        self._group = group
        self._room = room
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a decorator that makes a class known by a name.

        Raises:
            ValueError: another class has the name.
        """

        def decorate(cls: type[T]) -> type[T]:
            known = self._classes.setdefault(name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self._group}: {known.__module__} and {cls.__module__} both register {name!r}")
            self._classes[name] = cls
            return cls

        return decorate

    @cached_property
    def _loaded(self) -> dict[str, type[T]]:
        for module in pkgutil.iter_modules(import_module(self._room).__path__, f"{self._room}."):
            if not module.ispkg:
                import_module(module.name)
        for entry in entry_points(group=self._group):
            try:
                entry.load()
            except Exception as error:
                package = entry.dist.name if entry.dist else entry.value
                raise InputError(
                    f"the package {package}, installed beside sensmerge, cannot be loaded: its entry point "
                    f"{entry.name} of {self._group} raises {type(error).__name__}: {error}; mend or uninstall it"
                ) from error
        return self._classes

    def __getitem__(self, name: str) -> type[T]:
        """Return the class of a name."""
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        """Yield all names: those of the room first, by module, and in a module as they were registered.

        So the order, in which schemas and tables show them, does not depend on what was imported first.
        """

        def place(name: str) -> tuple[bool, str]:
            module = self._loaded[name].__module__
            return not module.startswith(f"{self._room}."), module

        return iter(sorted(self._loaded, key=place))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._loaded)
