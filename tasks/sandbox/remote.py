"""Tests in one process use the names of a program in another.

Whatever the program does to its own process, the tests see values alone: numbers, texts, lists and so on arrive as
copies; of another object, tests can call, read, write and iterate, each of which the program's process does.
"""

import builtins
import json
import socket
from collections.abc import Callable, Collection, Iterator
from typing import Any

from sensmerge.tasks.sandbox.values import decode, encode

MOST_BYTES = 64 * 2**20
"""of a message"""


class ProgramEndedError(BaseException):
    """The program's process is gone, or says what it cannot say. No test can catch it as an `Exception`."""


class UnsupportedError(BaseException):
    """A test does with the program what cannot be done from another process."""


class Channel:
    """Messages between two processes, as JSON."""

    def __init__(self, end: socket.socket) -> None:
        """Take one end of a pair of stream sockets."""
        self._end = end

    def send(self, message: Any) -> None:
        """Send a message. Raises ProgramEndedError if nobody reads, ValueError if it is too large."""
        text = json.dumps(message).encode()
        if len(text) > MOST_BYTES:
            raise ValueError("a value is too large")
        try:
            self._end.sendall(len(text).to_bytes(4, "big") + text)
        except OSError:
            raise ProgramEndedError from None

    def receive(self) -> Any:
        """Return the next message. Raises ProgramEndedError if there is none, or none that can be read."""
        size = int.from_bytes(self._take(4), "big")
        if size > MOST_BYTES:
            raise ProgramEndedError
        try:
            return json.loads(self._take(size))
        except (ValueError, RecursionError):
            raise ProgramEndedError from None

    def _take(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            try:
                more = self._end.recv(min(size - len(found), 2**20))
            except OSError:
                raise ProgramEndedError from None
            if not more:
                raise ProgramEndedError
            found += more
        return bytes(found)


# The program's side

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "put": lambda target, key, value: target.__setitem__(key, value),
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
    "bool": bool,
}


def serve(channel: Channel, load: Callable[[], dict[str, Any]]) -> None:
    """Load a program, tell its names, and do what the other side asks, until that is gone."""
    objects: list[Any] = []
    places: dict[int, int] = {}

    def refer(value: Any) -> int:
        place = places.setdefault(id(value), len(objects))
        if place == len(objects):
            objects.append(value)
        return place

    def loaded() -> Any:
        found = load()
        return {
            name: {"module": value.__name__} if isinstance(value, type(json)) else {"value": encode(value, refer)}
            for name, value in found.items()
            if isinstance(name, str) and not name.startswith("__")
        }

    def done() -> Any:
        request = channel.receive()
        target, *arguments = [decode(one, objects.__getitem__) for one in request["arguments"]]
        named = {name: decode(one, objects.__getitem__) for name, one in request["named"].items()}
        value = _OPERATIONS[request["operation"]](target, *arguments, **named)
        return {"value": encode(value, refer), "arguments": [encode(one, refer) for one in arguments]}

    _answer(channel, loaded)
    while True:
        _answer(channel, done)


def _answer(channel: Channel, work: Callable[[], Any]) -> None:
    try:
        channel.send(work())
    except ProgramEndedError:
        raise
    except BaseException as error:  # SystemExit, too, is an answer of the program's
        channel.send({"error": type(error).__name__})


# The tests' side


class RemoteObject:
    """An object of the program."""

    __slots__ = ("_ask", "_place")

    def __init__(self, ask: Callable[..., Any], place: int) -> None:
        """Take what sends requests, and the object's number on the other side."""
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_place", place)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it; lists, dictionaries and sets among the arguments are changed as the program changed them."""
        return self._ask("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of it; refuse what `isinstance` reads, which would never find one of its instances."""
        if name == "__bases__":
            raise UnsupportedError("a test asks for instances of a class of the program")
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of it."""
        self._ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        """Return an item of it."""
        return self._ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Set an item of it."""
        self._ask("put", self, key, value)

    def __len__(self) -> int:
        """Return its length."""
        return int(self._ask("len", self))

    def __bool__(self) -> bool:
        """Return whether it counts as true."""
        return bool(self._ask("bool", self))

    def __iter__(self) -> Iterator[Any]:
        """Yield its items."""
        iterator = self._ask("iter", self)
        while True:
            try:
                found = self._ask("next", iterator)
            except StopIteration:
                return
            yield found

    def __next__(self) -> Any:
        """Return its next item."""
        return self._ask("next", self)

    def __str__(self) -> str:
        """Return its text."""
        return str(self._ask("str", self))

    def __repr__(self) -> str:
        """Return its repr."""
        return str(self._ask("repr", self))

    def _compare(self, other: Any) -> bool:
        """Refuse: an object that decides itself what it equals would equal whatever is expected."""
        raise UnsupportedError("a test compares an object that is no plain value")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _compare

    def __hash__(self) -> int:
        """Return a number for it."""
        return hash(self._place)


class Program:
    """A program in another process, as its tests use it."""

    def __init__(self, channel: Channel) -> None:
        """Take the channel to the process that serves it."""
        self._channel = channel
        self._objects: dict[int, RemoteObject] = {}

    def names(self, used: Collection[str], stdlib: Collection[str]) -> dict[str, Any]:
        """Return what the program defines, by name.

        What would hide Python's own names from the tests is left out, unless the tests use nothing else of the
        program: then it is what they ask for. Modules of the standard library are the tests' own.

        Args:
            used: names that the tests use.
            stdlib: names of the standard library's modules; others are left out.
        """
        found: dict[str, Any] = {}
        answer = self._answer()
        asked = any(name in used and "value" in one and not hasattr(builtins, name) for name, one in answer.items())
        for name, one in answer.items():
            # Of what begins so, the interpreter reads `__builtins__` itself: where `len` and others are looked for.
            if name.startswith("__") or (asked and hasattr(builtins, name)):
                continue
            if "value" in one:
                found[name] = decode(one["value"], self._resolve)
            elif one["module"].partition(".")[0] in stdlib:
                found[name] = __import__(one["module"], fromlist=["*"])
        return found

    def _resolve(self, place: Any) -> RemoteObject:
        return self._objects.setdefault(int(place), RemoteObject(self._ask, int(place)))

    def _refer(self, value: Any) -> int:
        if type(value) is not RemoteObject:
            raise UnsupportedError(f"a test passes on a {type(value).__name__}")
        place: int = value._place
        return place

    def _ask(self, operation: str, *arguments: Any, **named: Any) -> Any:
        sent = [encode(one, self._refer) for one in arguments]
        others = {name: encode(one, self._refer) for name, one in named.items()}
        self._channel.send({"operation": operation, "arguments": sent, "named": others})
        answer = self._answer()
        for mine, before, changed in zip(arguments[1:], sent[1:], answer["arguments"], strict=True):
            if changed != before:
                _change(mine, decode(changed, self._resolve))
        return decode(answer["value"], self._resolve)

    def _answer(self) -> Any:
        answer = self._channel.receive()
        if isinstance(answer, dict) and "error" in answer and isinstance(answer["error"], str):
            kind = getattr(builtins, answer["error"], None)
            raise kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception
        return answer


def _change(mine: Any, changed: Any) -> None:
    """Make an argument what the program made of its copy."""
    if isinstance(mine, list):
        mine[:] = changed
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(changed)
