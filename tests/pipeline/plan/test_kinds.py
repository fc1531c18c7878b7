"""Tasks that have no meaning for the network of their expert, before anything else that is asked of it."""

from pathlib import Path

import pytest

from sensmerge.tasks.errors import InputError
from tests.census.cases import make_case
from tests.census.se import SE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "WhisperForConditionalGeneration",
            r"completion needs a language model, .* \(whisper\) is an encoder-decoder, ",
        ),
        ("CLIPModel", r"completion needs a language model; .* has no causal_lm network for model_type 'clip'; "),
    ],
)
def test_the_task_is_named_and_not_what_is_to_be_done_with_it(name: str, message: str, tmp_path: Path) -> None:
    case = make_case(name, tmp_path, lora=False)
    with pytest.raises(InputError, match=rf"^tasks\.first\.kind: {message}.*leave the task out"):
        case.plan(case.recipe("full", SE), "se")


def test_a_classifier_of_pictures_does_not_classify_texts(tmp_path: Path) -> None:
    case = make_case("ViTForImageClassification", tmp_path, lora=False)
    recipe = case.recipe("full", SE)
    for task in recipe["tasks"].values():
        task["kind"] = "classification"
    said = r"^tasks\.first\.kind: classification, but .* is a ViTForImageClassification; expected a classifier of texts"
    with pytest.raises(InputError, match=said):
        case.plan(recipe, "se")


def test_a_classifier_of_texts_does_not_classify_pictures(tmp_path: Path) -> None:
    case = make_case("BertForSequenceClassification", tmp_path, lora=False)
    recipe = case.recipe("full", SE)
    for task in recipe["tasks"].values():
        task["kind"] = "image_classification"
    said = r"^tasks\.first\.kind: image_classification, but .* is a BertForSequenceClassification; .* of pictures"
    with pytest.raises(InputError, match=said):
        case.plan(recipe, "se")


def test_encoder_decoders_write_and_language_models_continue(tmp_path: Path) -> None:
    for name, kind, message in (
        ("T5ForConditionalGeneration", "completion", r"is an encoder-decoder, .* or use kind seq2seq$"),
        (
            "LlamaForCausalLM",
            "seq2seq",
            r"needs an encoder-decoder that writes, but .* \(llama\) is none of texts; leave",
        ),
    ):
        case = make_case(name, tmp_path / name, lora=False)
        recipe = case.recipe("full", SE)
        for task in recipe["tasks"].values():
            task.clear()
            task |= {"kind": kind, "calibration": {"path": "json", "data_files": str(case.folder / "first.jsonl")}}
        with pytest.raises(InputError, match=message):
            case.plan(recipe, "other")
