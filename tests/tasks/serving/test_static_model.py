"""Static merges that answer texts, against transformers on the merged checkpoint and the experts' own heads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.generation import Decoding
from sensmerge.tasks.serving.static_model import StaticModel, form_of
from tests.conftest import bert_config, make_bert_expert, make_bert_trunk, make_llama, perturbed
from tests.tasks.stages.test_merge import make_job, merged

Save = Callable[..., Path]
Folders = dict[str, Path]
TEXTS = ["1+2=", "print(x", "9", "def g(a): return"]


@pytest.fixture(scope="module")
def writer(llamas: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged language model."""
    folder = tmp_path_factory.mktemp("writer")
    merged(make_job(folder, llamas["base"], {name: llamas[name] for name in ("math", "code")}), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def trunk(berts: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged trunk with the heads of two classifiers."""
    folder = tmp_path_factory.mktemp("trunk")
    merged(make_job(folder, berts["base"], {name: berts[name] for name in ("mood", "topic")}), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def classifier(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier merged with its head: base and experts have the same classes."""
    folder = tmp_path_factory.mktemp("classifier")
    models = {name: save(make_bert_expert(make_bert_trunk(), 5, 3), name, folder) for name in ("base",)}
    models |= {
        name: save(perturbed(make_bert_expert(make_bert_trunk(), 5, 3), seed), name, folder)
        for seed, name in enumerate(("x", "y"), 1)
    }
    merged(make_job(folder, models["base"], {name: models[name] for name in "xy"}), folder / "out")
    return folder / "out"


def classes(network: PreTrainedModel, folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        with torch.no_grad():
            logits = network.eval()(**tokenizer(text, return_tensors="pt")).logits
        found.append(network.config.id2label[int(logits.argmax())])
    return found


def test_a_language_model_continues_as_transformers_does(writer: Path) -> None:
    assert form_of(writer) == "language_model"
    model = StaticModel.load(writer)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(writer), AutoTokenizer.from_pretrained(writer)
    expected = []
    for text in TEXTS:
        given = tokenizer(text, return_tensors="pt")
        found = network.generate(**given, max_new_tokens=5, do_sample=False)[0, given["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(found, skip_special_tokens=True))
    assert model.predict(TEXTS, max_new_tokens=5) == expected
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.network()(ids).logits, network(ids).logits, rtol=0, atol=0)


def test_every_head_answers_on_the_merged_trunk(trunk: Path, berts: Folders) -> None:
    assert form_of(trunk) == "trunk"
    model = StaticModel.load(trunk)
    merged_trunk = BertModel.from_pretrained(trunk)
    for task in ("mood", "topic"):
        expected = BertForSequenceClassification.from_pretrained(berts[task])
        expected.bert.load_state_dict(merged_trunk.state_dict())
        assert model.predict(TEXTS, task=task) == classes(expected, trunk)
    assert model.networks["mood"].base_model is model.networks["topic"].base_model
    for task in (None, "weather"):
        with pytest.raises(InputError, match=f"task is {task}; expected the parameter task, one of mood, topic"):
            model.predict(TEXTS, task=task)


def test_a_head_that_reaches_into_the_trunk_keeps_its_own(save: Save, tmp_path: Path) -> None:
    """The base has no pooler, each classifier has its own."""
    base = save(BertModel(bert_config(), add_pooling_layer=False), "base", tmp_path)
    experts = {}
    for seed, name in enumerate(("mood", "topic"), 1):
        network = perturbed(BertForSequenceClassification(bert_config()), seed)
        network.bert.load_state_dict(load_file(base / "model.safetensors"), strict=False)
        experts[name] = save(perturbed(network, seed), name, tmp_path)
    merged(make_job(tmp_path, base, experts), tmp_path / "out")
    model = StaticModel.load(tmp_path / "out")
    for name, folder in experts.items():
        found = model.networks[name].bert.pooler.dense.weight
        assert torch.equal(found, load_file(folder / "model.safetensors")["bert.pooler.dense.weight"])


def test_a_classifier_that_is_merged_with_its_head(classifier: Path) -> None:
    assert form_of(classifier) == "classifier"
    model = StaticModel.load(classifier)
    network = AutoModelForSequenceClassification.from_pretrained(classifier)
    assert model.predict(TEXTS) == classes(network, classifier)
    with pytest.raises(InputError, match="task is mood; expected none, the model is one whole network"):
        model.predict(TEXTS, task="mood")


def test_what_neither_continues_nor_classifies_is_refused(save: Save, tmp_path: Path) -> None:
    folder = save(BertForMaskedLM(bert_config()), "masked", tmp_path)
    assert form_of(folder) is None
    with pytest.raises(InputError, match="is no language model and no classifier; load it with transformers"):
        StaticModel.load(folder)


def test_another_dtype_and_no_texts(writer: Path) -> None:
    model = StaticModel.load(writer, dtype="bfloat16")
    assert model.network().dtype == torch.bfloat16
    assert len(model.predict(TEXTS, 2)) == len(TEXTS)
    assert model.predict([]) == []


@pytest.mark.parametrize(
    ("texts", "new", "message"),
    [
        ([""], 3, "text 0 has 0 tokens; the model takes 1 to 125"),
        (["a", "b" * 126], 3, "text 1 has 126 tokens"),
        (["a"], 0, "max_new_tokens is 0; expected at least 1"),
        (["a"], 128, "max_new_tokens is 128; the model takes 128 tokens, prompt included: lower it"),
    ],
)
def test_texts_that_cannot_be_answered(texts: list[str], new: int, message: str, writer: Path) -> None:
    with pytest.raises(InputError, match=message):
        StaticModel.load(writer).predict(texts, new)


def test_a_folder_that_lost_its_weights(save: Save, tmp_path: Path) -> None:
    folder = save(make_llama(), "base", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no safetensors|model\.safetensors"):
        StaticModel.load(folder)


def test_rows_are_asked_in_prompts_that_are_given(writer: Path, trunk: Path) -> None:
    prompts = {"math": CompletionTask(kind="completion", prompt="{a}+{b}=")}
    model = StaticModel.load(writer, prompts=prompts)
    rows = [{"task": "math", "a": 1, "b": 2}, {"text": "9"}]
    assert model.predict(rows, 5) == model.predict(["1+2=", "9"], 5)
    how = Decoding(temperature=1.0, stop=("e",))
    assert model.predict(rows, 5, decoding=how) == model.predict(["1+2=", "9"], 5, decoding=how)
    with pytest.raises(InputError, match=r"^text 1: task is 'code'; expected one of math"):
        model.predict([rows[0], {"task": "code"}])
    moods = {name: ClassificationTask(kind="classification", prompt=f"{name}: {{said}}") for name in ("mood", "topic")}
    heads = StaticModel.load(trunk, prompts=moods)
    asked = [{"task": name, "said": text} for text in TEXTS for name in ("mood", "topic")]
    expected = [heads.predict([f"{row['task']}: {row['said']}"], task=row["task"])[0] for row in asked]
    assert heads.predict(asked) == expected
    assert len(set(expected)) > 1
    with pytest.raises(InputError, match="seed is 3, but the model writes no text; leave it out"):
        heads.predict(asked, decoding=Decoding(seed=3))
