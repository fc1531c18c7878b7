"""What lies beside a model's weights: which files travel into merged models, and how they are copied."""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
from typing import Any

from sensmerge.tasks.artifacts import file_bytes, load_json, write_json

WEIGHTS = "*.safetensors"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
LARGEST = 100 * 2**20
"""Bytes; the vocabularies of today are a third of it at most."""

TOKENIZER = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "bpe.codes"]
TOKENIZER += ["*.model", "*.spm", "*.vocab", "*.tiktoken", "tekken.json", "chat_template.*"]
TOKENIZER += ["additional_chat_templates/*"]
"""Patterns of the files that a tokenizer may consist of, its chat templates among them."""
VOCABULARY = ["tokenizer.json", "vocab.*", "*.model", "*.spm", "*.tiktoken", "tekken.json"]
"""Patterns of the files of which a tokenizer has one at least."""

_LICENCE = ["license*", "licence*", "notice*", "use_policy*"]
_LEFT = [WEIGHTS, "*.index.json", "consolidated*"]
_LEFT += [
    f"*.{kind}" for kind in ("bin", "pt", "pth", "ckpt", "pkl", "pickle", "joblib", "npy", "npz", "h5", "msgpack")
]
_LEFT += [f"*.{kind}" for kind in ("onnx", "onnx_data", "ot", "gguf", "ggml", "tflite", "mlmodel", "engine", "nemo")]
_ARCHIVES = ["*.tar*", "*.zip", "*.gz"]
_LEFT += _ARCHIVES  # weights and programs in other formats, pickles among them
_LEFT += ["adapter_config.json", "adapter_model.*"]
_LEFT += ["training_args.*", "trainer_state.json", "optimizer*", "scheduler*", "rng_state*", "scaler*", "latest"]
_LEFT += ["*_results.json", "events.out.tfevents*", "*.log"]  # what trainers leave
_LEFT += ["*.py", "*.sh", "*.ipynb"]  # code, which is never run
_LEFT += ["*.md", "readme*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf"]  # about another model
_LEFT += ["manifest.json", "fingerprint.json", "tensors.json", "coefficients.json", "mlmodel"]  # of an earlier merge
_LEFT += ["*quant*_config.json", "quantize_config.json", "imatrix*", "openvino*"]  # say what merged models are not
_LEFT += ["*.dat", "*.bak", "*.tmp", "global_step*", "recipe.y*ml"]
_LEFT += [".*"]
"""Patterns of what is left behind; all other small files travel."""

_SUBFOLDER = re.compile(r"additional_chat_templates|\d+_\w+")
"""Named chat templates, and the modules of SentenceTransformers (`1_Pooling`): folders whose files travel, too."""


def is_plain(name: str) -> bool:
    """Return whether a name is that of a file in a model's folder, or in one of the subfolders whose files travel."""
    *folders, file = name.split("/")
    if any(PureWindowsPath(part).name != part or part in {"", ".", ".."} for part in (*folders, file)):
        return False
    return len(folders) <= 1 and all(_SUBFOLDER.fullmatch(folder) for folder in folders)


def is_companion(name: str, size: int) -> bool:
    """Return whether a file of a model, but for its `config.json`, travels into merged models.

    Args:
        name: its path in the model's folder.
        size: its bytes.
    """
    if not is_plain(name) or name == CONFIG or size > LARGEST:
        return False
    folder, _, file = name.rpartition("/")
    if folder and file == "model.safetensors":
        return True  # a module of SentenceTransformers behind the network
    return (_matches(file, _LICENCE) and not _matches(file, _ARCHIVES)) or not _matches(file, _LEFT)


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file belongs to a tokenizer."""
    return _matches(name, TOKENIZER)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer of its own."""
    return any(_matches(path.name, VOCABULARY) for path in folder.iterdir() if path.is_file())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def local_files(folder: Path) -> dict[str, Path]:
    """Return all files of a folder and of those of its subfolders whose files may travel, by their path in it."""
    found = {path.name: path for path in folder.iterdir() if path.is_file()}
    for inner in folder.iterdir():
        if inner.is_dir() and not inner.is_symlink() and _SUBFOLDER.fullmatch(inner.name):
            found |= {f"{inner.name}/{path.name}": path for path in inner.iterdir() if path.is_file()}
    return dict(sorted(found.items()))


def companions(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that travel, by their path in it."""
    return {name: path for name, path in local_files(folder).items() if is_companion(name, path.stat().st_size)}


def copy_companions(files: Mapping[str, Path], target: Path) -> None:
    """Copy files to their paths in another folder; of JSON files, what names code is left out.

    Raises:
        InputError: a JSON file that does not parse.
    """
    for name, path in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        cleaned = without_code(load_json(path)) if path.suffix == ".json" and names_code(path) else None
        if cleaned is None:
            shutil.copyfile(path, target / name)
        else:
            write_json(target / name, cleaned)


def names_code(path: Path) -> bool:
    """Return whether a JSON file tells transformers to run code that lies beside it; merged models have none."""
    return path.suffix == ".json" and b'"auto_map"' in file_bytes(path) and any(_code_keys(load_json(path)))


def without_code(value: Any) -> Any:
    """Return a JSON value without the keys, at any depth, that name code: `auto_map` and `custom_pipelines`."""
    if not isinstance(value, dict):
        return value
    return {key: without_code(inner) for key, inner in value.items() if key not in _CODE}


_CODE = {"auto_map", "custom_pipelines"}


def _code_keys(value: Any) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key in _CODE:
            yield key
        yield from _code_keys(inner)
