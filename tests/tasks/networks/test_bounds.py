from pathlib import Path

import pytest
from transformers import Gemma4TextConfig, LlamaConfig

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.bounds import check_bounds, setting
from sensmerge.tasks.networks.networks import describe

PATH = Path("config.json")


def gemma4(**changes: object) -> Gemma4TextConfig:
    """Blocks with heads of two widths."""
    layers = ["sliding_attention", "full_attention"]
    return Gemma4TextConfig(
        num_hidden_layers=2, layer_types=layers, **{"head_dim": 8, "global_head_dim": 16, **changes}
    )


def test_blocks_may_have_settings_of_their_own() -> None:
    config = gemma4()
    assert setting(config, "head_dim") == [8, 16]
    assert setting(config, "hidden_size") == config.hidden_size
    check_bounds(config, PATH)
    assert describe(config)["num_hidden_layers"] == 2


def test_the_settings_of_each_block_are_checked() -> None:
    with pytest.raises(InputError, match=r"config\.json: head_dim is 100000; expected a whole number from 0 to 16,384"):
        check_bounds(gemma4(global_head_dim=100_000), PATH)


def test_sizes_beyond_use_are_refused() -> None:
    with pytest.raises(InputError, match=r"vocab_size is 0; expected a whole number from 1"):
        check_bounds(LlamaConfig(vocab_size=0), PATH)
