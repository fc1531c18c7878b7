"""Values and bytes that no honest file holds, drawn with a seed."""

import copy
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import yaml

SLOW_PATTERN = "(.|..|...)+[!?]"
SECRET = "../secret/canary.json"
KEYS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None], "AutoModelForCausalLM": "evil.Evil"},
    "attn_implementation": "some/kernels",
    "_attn_implementation": "some/kernels",
    "experts_implementation": "sonicmoe",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "trust_remote_code": True,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "some/kernels:RMSNorm"},
    "custom_pipelines": {"x": {"impl": "evil.Evil", "pt": ["AutoModel"]}},
    "configuration_files": ["../secret/config.4.0.0.json"],
    "fast_tokenizer_files": ["../secret/tokenizer.4.0.0.json"],
    "gguf_file": "../secret/canary.gguf",
    "vocab_file": SECRET,
    "tokenizer_file": SECRET,
    "name_or_path": SECRET,
    "_name_or_path": "https://127.0.0.1:9/x",
    "per_layer_config": {"0": {"attn_implementation": "some/kernels"}},
    "text_config": {"attn_implementation": "some/kernels"},
    "chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "rank_pattern": {SLOW_PATTERN: 2},
    "alpha_pattern": {"(": 2},
    "target_modules": SLOW_PATTERN,
    "__class__": "x",
    "dtype": "nonsense",
    "torch_dtype": 5,
    "id2label": {str(n): "x" for n in range(3)},
    "rope_scaling": {"rope_type": "dynamic", "factor": -1},
    "rope_parameters": 5,
    "layer_types": ["x"] * 3,
    "architectures": ["PreTrainedModel"],
    "model_type": "timm_backbone",
}


def value(draw: Random) -> Any:
    """A value of any type."""
    nested: Any = 1
    for _ in range(draw.choice([3, 60, 900])):
        nested = draw.choice([[nested], {"a": nested}])
    return draw.choice(
        [
            *(None, True, False, 0, -1, 1.5, 10**30, 10**400, float("nan"), float("inf"), -0.0, 1e308),
            *(
                "",
                " ",
                "x" * 10**5,
                "\ud800",
                "\x00",
                "a\nb\rc",
                "\u202e",
                "{}",
                "null",
                "1",
                "-1",
                "../..",
                "/etc/passwd",
            ),
            *(SECRET, "some/kernels", "http://127.0.0.1:9/x", "file:///etc/passwd", SLOW_PATTERN, "a{4294967294}", "("),
            *([], {}, [None], {"": None}, [[]], [1, "a"], list(range(10**4)), {str(n): n for n in range(2000)}, nested),
        ]
    )


def spoilt(content: Any, draw: Random) -> Any:
    """Return a JSON value with one to three changes somewhere in it."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        parent, key = None, None
        here = content
        while isinstance(here, dict | list) and here and draw.random() < 0.85:
            parent, key = here, draw.choice(list(here) if isinstance(here, dict) else range(len(here)))
            here = parent[key]
        if parent is None or (isinstance(parent, dict) and draw.random() < 0.3):
            target = parent if isinstance(parent, dict) else content
            if not isinstance(target, dict):
                return value(draw)
            name = draw.choice(sorted(KEYS))
            target[name] = KEYS[name] if draw.random() < 0.7 else value(draw)
        elif draw.random() < 0.2:
            del parent[key]
        else:
            parent[key] = value(draw)
    return content


def json_bytes(content: Any, draw: Random) -> bytes:
    """Return a spoilt JSON value as text, which may be spoilt too."""
    text = json.dumps(spoilt(content, draw))
    if draw.random() < 0.15 and text.startswith("{"):
        text = draw.choice(
            ['{"a": 1, "a": 2, ' + text[1:], "[" * 10**5, '{"a": ' + "9" * 5000 + "}", "NaN", f"[{text}]"]
        )
    return spoilt_bytes(text.encode("utf-8", "surrogatepass"), draw) if draw.random() < 0.2 else text.encode()


def spoilt_bytes(content: bytes, draw: Random) -> bytes:
    """Return bytes that are cut, changed, or of something else."""
    if not content:
        return b"\xff"
    place, end = sorted((draw.randrange(len(content)), draw.randrange(len(content))))
    changed = bytearray(content)
    for _ in range(draw.choice([1, 4, 50])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return draw.choice(
        [
            content[:place],
            content[:place] + content[end:],
            content[:place] + b"\xff\xfe" + content[place:],
            content[:place] + bytes(100) + content[place:],
            content * 3,
            bytes(changed),
            b"",
            b"\xef\xbb\xbf" + content,
            content.decode("utf-8", "replace").encode("utf-16"),
            b"version https://git-lfs.github.com/spec/v1\n",
            b"<!doctype html>\n",
            b"\x80\x04cos\nsystem\n(S'touch it-ran'\ntR.",
        ]
    )


def yaml_bytes(content: Any, draw: Random) -> bytes:
    """Return a recipe that is spoilt, or a YAML text that no parser should follow."""
    if draw.random() < 0.7:
        value = spoilt(content, draw)
        try:
            return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")
        except RecursionError:  # of the writer; YAML reads JSON as well
            return json.dumps(value).encode()
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    text = yaml.safe_dump(content, sort_keys=False)
    return (
        draw.choice(
            [
                bomb,
                f"{bomb}{text}",
                "[" * 10**5,
                "- " * 10**4,
                "{a: " * 5000,
                f"{text}name: twice\n",
                f"{text}x: !!python/object/apply:os.system ['touch it-ran']\n",
                f"{text}x: 2026-13-45\n",
                f"{text}x: !!timestamp nonsense\n",
                f"{text}x: !!int nonsense\n",
                f"{text}x: {'9' * 5000}\n",
                f"{text}{'k' * 5000}: 1\n",
                f"{text}<<: *none\n",
                f"{text}<<: [1]\n",
                f"{text}? [a]\n: b\n",
                f"&x\n{text}x: *x\n",
                f"--- 1\n--- 2\n{text}",
                f"%TAG ! tag:x,2000:\n---\n{text}",
                "",
                "null",
                "- a",
                text.replace(": ", ":\t"),
                text + "\x00",
            ]
        ).encode()
        if draw.random() < 0.8
        else spoilt_bytes(text.encode(), draw)
    )


def misplace(path: Path, draw: Random) -> None:
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    form = draw.choice(["folder", "pipe", "loop", "outside", "sparse", "none"])
    if form == "folder":
        path.mkdir()
    elif form == "pipe":
        os.mkfifo(path)
    elif form in ("loop", "outside"):
        path.symlink_to(path.name if form == "loop" else Path("/proc/self/mem"))
    elif form == "sparse":
        with path.open("wb") as file:
            file.truncate(2**31)
