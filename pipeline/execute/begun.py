"""Which steps a worker has begun: it says so in the cluster's own key-value store, for Ray does not say it.

Nothing depends on it but what is shown: where the store does not answer, work goes on.
"""

from contextlib import suppress

from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put

NAMESPACE = "sensmerge"
_SAID: set[str] = set()
"""What this process has said."""


def say_begun(run: str, title: str) -> None:
    """Say that a step of a run has begun, here where the first of its pieces does."""
    key = f"{run}/{title}"
    if key not in _SAID:
        with suppress(RayError):
            _internal_kv_put(key, b"", namespace=NAMESPACE)
        _SAID.add(key)


def begun(run: str) -> set[str]:
    """Return the titles of the steps of a run that have begun, as far as it is known."""
    with suppress(RayError):
        return {key.decode().removeprefix(f"{run}/") for key in _internal_kv_list(f"{run}/", namespace=NAMESPACE)}
    return set()


def forget(run: str) -> None:
    """Forget what was said of a run that has ended."""
    with suppress(RayError):
        _internal_kv_del(f"{run}/", del_by_prefix=True, namespace=NAMESPACE)
