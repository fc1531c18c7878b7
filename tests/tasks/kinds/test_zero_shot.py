"""What a recipe may say of classes that a head is made of."""

from typing import Any

import pytest
from pydantic import ValidationError

from sensmerge.tasks.kinds.zero_shot import ZeroShot


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"templates": ["a photo"]}, r"'a photo' has 0 of \{\}; expected one"),
        ({"templates": ["{} on {}"]}, r"'\{\} on \{\}' has 2 of \{\}; expected one"),
        ({"templates": []}, "at least 1 item"),
        ({"classes": ["cat"]}, "at least 2 items"),
        ({"classes": ["cat", "dog", "cat"]}, "'cat' stands for class 0 and for class 2"),
        ({"classes": ["cat", " "]}, "name 1 is empty"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ZeroShot(**{"classes": ["cat", "dog"], "templates": ["a photo of a {}."]} | settings)
