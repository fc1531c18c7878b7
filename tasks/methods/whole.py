"""What a method adds to the base, as far as the form of a merge depends on it."""

from collections.abc import Iterable

from sensmerge.tasks.methods.contract import Additive, Method


def sums_whole(method: Method, experts: Iterable[str]) -> bool:
    """Return whether a method adds a multiple of each expert's whole task vector to the base."""
    return isinstance(method, Additive) and all(method.keeps_whole(expert) for expert in experts)


def changes_base(method: Method) -> bool:
    """Return whether a method changes tensors that no expert has touched."""
    if not isinstance(method, Additive):
        return method.changes_untouched
    try:
        method.check_se()
    except ValueError:
        return True
    return False
