"""Digests of written checkpoints, worked out here in another way."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.stages.written import weights_digest


@pytest.mark.parametrize("prefix", ["blake3:", ""], ids=["as now", "by earlier versions"])
def test_a_digest_is_over_names_dtypes_shapes_and_content(prefix: str, tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2], dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    content = {}
    for name in ("a", "b"):
        data = tensors[name].view(torch.uint8).numpy().tobytes()
        digest = blake3(data).hexdigest() if prefix else hashlib.sha256(data).hexdigest()
        content[name] = [str(tensors[name].dtype), list(tensors[name].shape), digest]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    expected = prefix + hashlib.sha256(text.encode()).hexdigest()
    assert weights_digest(open_checkpoint(tmp_path), like=prefix + "0" * 64) == expected
