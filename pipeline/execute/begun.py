"""Which steps a worker has begun: it says so in the cluster's own key-value store, for Ray does not say it."""

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put

NAMESPACE = "sensmerge"
_SAID: set[str] = set()
"""What this process has said."""


def say_begun(run: str, title: str) -> None:
    """Say that a step of a run has begun, here where the first of its pieces does."""
    key = f"{run}/{title}"
    if key not in _SAID:
        _internal_kv_put(key, b"", namespace=NAMESPACE)
        _SAID.add(key)


def begun(run: str) -> set[str]:
    """Return the titles of the steps of a run that have begun."""
    return {key.decode().removeprefix(f"{run}/") for key in _internal_kv_list(f"{run}/", namespace=NAMESPACE)}


def forget(run: str) -> None:
    """Forget what was said of a run that has ended."""
    _internal_kv_del(f"{run}/", del_by_prefix=True, namespace=NAMESPACE)
