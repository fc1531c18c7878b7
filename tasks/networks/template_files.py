"""The chat templates in a model's folder, whichever files they are in."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from sensmerge.tasks.artifacts import load_object, write_json
from sensmerge.tasks.checkpoints.companions import TOKENIZER_CONFIG, companions
from sensmerge.tasks.deadline import deadline
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import load_tokenizer

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a chat template raises that cannot write some messages."""
SECONDS = 10.0
"""How long a chat template, which may come from anybody, may write at some messages; most take milliseconds."""


def chat_templates(folder: Path) -> dict[str, Any]:
    """Return what a model's files hold of chat templates, by file."""
    found: dict[str, Any] = {
        name: _text(path)
        for name, path in companions(folder).items()
        if name.startswith(("chat_template.", "additional_chat_templates/"))
    }
    stated = object_in(folder / TOKENIZER_CONFIG).get("chat_template")
    return found | ({TOKENIZER_CONFIG: stated} if stated else {})


def template_texts(folder: Path) -> set[str]:
    """Return the texts of all chat templates, whichever file they are in."""
    texts: set[str] = set()
    for name, found in chat_templates(folder).items():
        if name.endswith(".json"):
            found = object_in(folder / name).get("chat_template") if name != TOKENIZER_CONFIG else found
        entries = found if isinstance(found, list) else [found]
        texts |= {str(one.get("template") if isinstance(one, dict) else one) for one in entries}
    return texts


def set_template(folder: Path, template: str) -> None:
    """Give a tokenizer one chat template instead of all that it has."""
    for name in chat_templates(folder):
        if name != TOKENIZER_CONFIG:
            (folder / name).unlink()
    config = object_in(folder / TOKENIZER_CONFIG)
    if config.pop("chat_template", None) is not None:
        write_json(folder / TOKENIZER_CONFIG, config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    try:
        with deadline(SECONDS):
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TimeoutError:
        raise InputError(f"tokenizer.chat_template: has not written a message after {SECONDS:g} seconds") from None
    except TemplateSyntaxError as error:
        raise InputError(f"tokenizer.chat_template: no Jinja template ({error}); correct it") from error
    except TEMPLATE_ERRORS:  # a template may refuse this conversation
        return


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save the file as UTF-8, or leave it out") from None


def object_in(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty where there is none; raises InputError if it is no JSON object."""
    return load_object(path) if path.is_file() else {}
