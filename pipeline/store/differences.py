"""What differs between two JSON values, in words."""

import re
from typing import Any


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List where two JSON values differ, `settings.weight: 0.4 → 0.5`.

    Digests, and the files of a model, are only said to have changed.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in {**old, **new}:
            inner = f"{path}.{key}" if path else str(key)
            if key not in old:
                found.append(f"{inner} is new")
            elif key not in new:
                found.append(f"{inner} is gone")
            else:
                found += differences(old[key], new[key], inner)
        return found
    if old == new:
        return []
    if _are_files(old) and _are_files(new):
        before, now = ({file["name"]: file for file in files} for files in (old, new))
        how = {True: "changed", False: "is gone"}
        found = [f"{name} {how[name in now]}" for name, file in before.items() if now.get(name) != file]
        return found + [f"{name} is new" for name in now if name not in before]
    if _is_digest(old) and _is_digest(new):
        return [f"{path.removesuffix('.fingerprint').removesuffix('.digest')} changed"]
    return [f"{path}: {old} → {new}"]


def _are_files(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and "name" in one and "digest" in one for one in value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
