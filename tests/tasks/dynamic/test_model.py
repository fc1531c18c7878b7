"""A dynamic model against weights that are written out for each sample, and against folders that are damaged."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    pipeline,
)

from sensmerge.tasks.artifacts import Artifact, canonical, read_json, sha256_file, sha256_text
from sensmerge.tasks.dynamic import network as dynamic_network
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.dynamic.folder import MANIFEST
from sensmerge.tasks.dynamic.model import PADDING, DynamicModel, Routes
from sensmerge.tasks.dynamic.network import DynamicNetwork
from sensmerge.tasks.dynamic.vectors import BASE
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import RowSet
from sensmerge.tasks.networks.generation import GREEDY, Decoding
from sensmerge.tasks.networks.tokens import Inputs, batches, length
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.route import RouteJob
from tests.conftest import (
    llama_config,
    make_adapter,
    make_bert_expert,
    make_bert_trunk,
    make_llama,
    perturbed,
    row_set,
)
from tests.tasks.stages.test_merge import make_job, merged
from tests.tasks.stages.test_merge_vectors import dynamic, of_vectors, vectors_of, weights_of

Save = Callable[..., Path]
Folders = dict[str, Path]
TEXTS = ["1+2=", "print(x", "9", "def g(a): return", "71+11="]


@dataclass(frozen=True)
class Merge:
    """What stage merge left, and what it was made of."""

    job: MergeJob
    folder: Path
    calibration: Mapping[str, RowSet]

    @property
    def static(self) -> float:
        return of_vectors(self.job).static

    def routed(self, out: Path, **settings: Any) -> DynamicModel:
        """Run stage route and load the result."""
        self.run(out, **settings)
        return DynamicModel.load(out)

    def run(self, out: Path, **settings: Any) -> dict[str, Any]:
        application = SeApplication(**{"kind": "se", "fallback": 0.0, **settings})
        out.mkdir(parents=True, exist_ok=True)
        job = RouteJob(Artifact("", self.folder), self.calibration, application, self.static, "float32", "cpu")
        return job.finish(out)


def completions(*prompts: str) -> RowSet:
    task = CompletionTask(kind="completion", batch_size=3)
    return row_set(task, [{"prompt": prompt, "completion": "7"} for prompt in prompts])


def classes(number: int, *texts: str) -> RowSet:
    rows: list[Row] = [{"text": text, "label": i % number} for i, text in enumerate(texts)]
    return row_set(ClassificationTask(kind="classification"), rows, {f"LABEL_{i}": i for i in range(number)})


CALIBRATION = {
    "math": completions("1+1=", "23+4=", "6+66=", "8+9="),
    "code": completions("def f(x):", "print(y)", "import os", "class A:"),
    "lora": completions("ZZZZ", "YY ZZ", "ZYX", "XXZZY"),
}


def merge(folder: Path, base: Path, experts: Folders, sets: Mapping[str, RowSet], **how: Any) -> Merge:
    job = make_job(folder, base, experts, **how)
    dynamic(job, folder / "merge")
    return Merge(job, folder / "merge", sets)


@pytest.fixture(scope="module")
def llama_experts(llamas: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    lora = make_adapter(make_llama(), tmp_path_factory.mktemp("lora") / "lora", 3, target_modules="all-linear")
    return {"math": llamas["math"], "code": llamas["code"], "lora": lora}


@pytest.fixture(scope="module")
def causal(llamas: Folders, llama_experts: Folders, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """Two full fine-tunes and a LoRA adapter under task arithmetic."""
    return merge(tmp_path_factory.mktemp("causal"), llamas["base"], llama_experts, CALIBRATION)


@pytest.fixture(scope="module")
def encoders(berts: Folders, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """Classifiers with heads of their own."""
    sets = {"mood": classes(2, "good", "bad", "fine", "sad"), "topic": classes(3, "12", "345", "6789", "0")}
    experts = {name: berts[name] for name in sets}
    return merge(tmp_path_factory.mktemp("encoders"), berts["base"], experts, sets)


def tokenised(model: DynamicModel, texts: list[str]) -> list[Inputs]:
    return [{"input_ids": model.tokenizer(text)["input_ids"]} for text in texts]


def plain_logits(network: PreTrainedModel, sample: Inputs) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network.eval()(torch.tensor([sample["input_ids"]])).logits[0]
    return logits


def set_weights(network: PreTrainedModel, base: Path, vectors: Mapping[str, Any], row: Mapping[str, float]) -> None:
    """Give a network, or its trunk, the weights base + Σ coefficient · vector."""
    weights = weights_of(base)
    for name, by_expert in vectors.items():
        for expert, vector in by_expert.items():
            weights[name] = weights[name] + row[expert] * vector.dense()
    prefix = "" if set(weights) <= set(network.state_dict()) else f"{network.base_model_prefix}."
    left = network.load_state_dict({prefix + name: tensor for name, tensor in weights.items()}, strict=False)
    assert not left.unexpected_keys
    network.tie_weights()


def by_name(model: DynamicModel, routes: Routes, row: int) -> dict[str, float]:
    return dict(zip(model.experts, routes.coefficients[row].tolist(), strict=True))


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "how"),
    [("task_arithmetic", {}), ("ties", {"settings": {"density": 0.4}})],
)
def test_a_large_temperature_is_the_static_merge(
    method: str, how: dict[str, Any], llamas: Folders, llama_experts: Folders, tmp_path: Path
) -> None:
    one = merge(tmp_path, llamas["base"], llama_experts, CALIBRATION, method=method, **how)
    merged(one.job, tmp_path / "static")
    model = one.routed(tmp_path / "out", temperature=1e9)
    static, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "static", llamas["base"]))
    samples = tokenised(model, TEXTS)
    found = model.logits(samples, model.route(samples))
    for sample, logits in zip(samples, found, strict=True):
        expected = plain_logits(static, sample)
        torch.testing.assert_close(logits[: length(sample)], expected, rtol=0, atol=1e-4)
        assert (plain_logits(base, sample) - expected).abs().max() > 0.01


@pytest.mark.parametrize("score", ["centroid", "discriminant", "nearest", "shift", "alignment"])
def test_a_small_temperature_with_mass_one_is_the_nearest_expert(
    score: str, causal: Merge, llama_experts: Folders, tmp_path: Path
) -> None:
    model = causal.routed(tmp_path, temperature=1e-6, mass=1.0, score=score, layer=2, pool="mean")
    samples = tokenised(model, TEXTS)
    routes = model.route(samples)
    assert torch.equal(routes.coefficients, torch.eye(3)[routes.experts])
    found = model.logits(samples, routes)
    networks = {name: AutoModelForCausalLM.from_pretrained(llama_experts[name]) for name in ("math", "code")}
    networks["lora"] = PeftModel.from_pretrained(make_llama(), llama_experts["lora"]).merge_and_unload()
    for sample, logits, expert in zip(samples, found, routes.experts, strict=True):
        expected = plain_logits(networks[model.experts[expert]], sample)
        torch.testing.assert_close(logits[: length(sample)], expected, rtol=0, atol=1e-4)


def test_permuting_experts_permutes_coefficients(causal: Merge, tmp_path: Path) -> None:
    settings = {"temperature": 0.3, "score": "shift", "layer": 1, "pool": "last"}
    one = causal.routed(tmp_path / "one", **settings)
    backwards = {name: causal.calibration[name] for name in reversed(causal.calibration)}
    other = Merge(causal.job, causal.folder, backwards).routed(tmp_path / "other", **settings)
    assert other.experts == one.experts[::-1]
    samples = tokenised(one, TEXTS)
    first, second = one.route(samples), other.route(samples)
    torch.testing.assert_close(second.coefficients.flip(1), first.coefficients, rtol=0, atol=1e-5)
    assert [one.experts[i] for i in first.experts] == [other.experts[i] for i in second.experts]
    torch.testing.assert_close(one.logits(samples, first), other.logits(samples, second), rtol=0, atol=1e-4)


@pytest.mark.parametrize("score", ["centroid", "discriminant", "nearest", "shift", "alignment"])
def test_a_batch_gives_what_its_samples_give_one_by_one(score: str, causal: Merge, tmp_path: Path) -> None:
    model = causal.routed(tmp_path, temperature=0.3, score=score)
    samples = tokenised(model, TEXTS)
    together = model.route(samples)
    logits = model.logits(samples, together)
    for row, sample in enumerate(samples):
        alone = model.route([sample])
        torch.testing.assert_close(alone.coefficients[0], together.coefficients[row], rtol=0, atol=1e-4)
        torch.testing.assert_close(model.logits([sample], alone)[0], logits[row][: length(sample)], rtol=0, atol=1e-4)
    assert len({tuple(row) for row in together.coefficients.tolist()}) == len(TEXTS)


def test_answers_come_in_the_order_of_the_samples(encoders: Merge, tmp_path: Path) -> None:
    model = encoders.routed(tmp_path, temperature=0.2)
    texts = ["x" * length for length in (3, 90, 1, 40, 3, 41, 12)]
    samples = tokenised(model, texts)
    assert len(batches([length(one) for one in samples], padding=PADDING)) > 3
    routes = model.route(samples)
    given = ["mood", "topic", "topic", "mood", "topic", "mood", "mood"]
    routed = [model.experts[i] for i in routes.experts]
    for names, found in zip((given, routed), model.class_logits(samples, routes, given, routed), strict=True):
        for row, sample in enumerate(samples):
            alone = Routes(routes.coefficients[[row]], [routes.experts[row]])
            ((expected,),) = model.class_logits([sample], alone, [names[row]])
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-4)
    assert [one.expert for one in model.predict(texts)] == routed


@pytest.mark.parametrize("size", [None, 2])
def test_weights_that_are_written_out_give_what_coefficients_per_sample_give(
    size: int | None, llamas: Folders, encoders: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {name: CALIBRATION[name] for name in ("math", "code")}
    full = merge(tmp_path, llamas["base"], {name: llamas[name] for name in sets}, sets)
    model = full.routed(tmp_path / "model", temperature=0.2, score="nearest")
    classifier = encoders.routed(tmp_path / "classifier", temperature=0.2)
    texts = [text * times for text in TEXTS for times in (1, 3)]
    samples, inputs = tokenised(model, texts), tokenised(classifier, texts)
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.7], [0.3, 0.4]])
    chosen = [0, 1, 0, 2, 1, 1, 0, 0, 2, 0]
    routes, names = Routes(rows[chosen], chosen), ["mood", "topic"] * 5

    def answers() -> list[Any]:
        return [
            model.route(samples, size).coefficients,
            {row: logits[: length(samples[row])] for row, logits in model.each_logits(samples, routes, size)},
            classifier.class_logits(inputs, routes, names, size=size),
            model.generate(samples, routes, 4, size),
        ]

    expected, alike, written = answers(), DynamicNetwork.alike, []

    def spy(self: DynamicNetwork, row: Tensor) -> Any:
        written.append(row.tolist())
        return alike(self, row)

    monkeypatch.setattr(dynamic_network, "ALIKE_TOKENS", 1)
    monkeypatch.setattr(DynamicNetwork, "alike", spy)
    found = answers()
    probes = [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert written == ([] if size is None else probes + 3 * rows.tolist())
    assert found[3] == expected[3]
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=1e-4)


def test_low_rank_task_vectors_are_never_written_out(
    causal: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal.routed(tmp_path)
    monkeypatch.setattr(dynamic_network, "ALIKE_TOKENS", 1)
    monkeypatch.delattr(DynamicNetwork, "alike")
    samples = tokenised(model, TEXTS)
    assert len(dict(model.each_logits(samples, model.route(samples, 2), 2))) == len(TEXTS)


# Answers --------------------------------------------------------------------------------------------------------------


def test_generation_is_that_of_the_routed_weights(causal: Merge, llamas: Folders, tmp_path: Path) -> None:
    model = causal.routed(tmp_path, temperature=0.2, mass=1.5)
    samples = tokenised(model, TEXTS)
    routes = model.route(samples)
    found = model.generate(samples, routes, 12)
    network, vectors = make_llama().eval(), vectors_of(causal.folder)
    for row, sample in enumerate(samples):
        set_weights(network, llamas["base"], vectors, by_name(model, routes, row))
        ids = torch.tensor([sample["input_ids"]])
        with_prompt = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        expected = with_prompt[0, length(sample) :].tolist()
        assert found[row] == (expected[: expected.index(1)] if 1 in expected else expected)
    answers = model.predict(TEXTS, max_new_tokens=12)
    assert [one.prediction for one in answers] == [
        model.tokenizer.decode(ids, skip_special_tokens=True) for ids in found
    ]


def test_a_stream_is_the_answer_in_pieces(causal: Merge, tmp_path: Path) -> None:
    model = causal.routed(tmp_path, temperature=0.2, mass=1.5)
    drawn = Decoding(temperature=1.0, seed=2)
    for text in TEXTS:
        for how in (GREEDY, drawn):
            (expected,) = model.predict([text], 12, decoding=how)
            found = list(model.stream(text, 12, how))
            assert "".join(found) == expected.prediction
            assert len(found) > 1
    (whole,) = model.predict(TEXTS[:1], 12, decoding=drawn)
    stop = Decoding(temperature=1.0, seed=2, stop=(whole.prediction[3:5],))
    assert "".join(model.stream(TEXTS[0], 12, stop)) == whole.prediction[: whole.prediction.index(stop.stop[0])]
    # Who does not listen to the end holds up nobody.
    left = model.stream(TEXTS[0], 100, drawn)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert model.predict(TEXTS[:1], 12, decoding=drawn) == [whole]


def test_rows_are_asked_in_the_prompts_of_the_tasks(llamas: Folders, tmp_path: Path) -> None:
    task = CompletionTask(kind="completion", prompt="Q: {a}+{b}=", generate=5, max_length=40)
    rows = [{"a": i, "b": str(i), "completion": str(2 * i)} for i in range(4)]
    sets = {"math": row_set(task, rows), "code": CALIBRATION["code"]}
    one = merge(tmp_path, llamas["base"], {name: llamas[name] for name in sets}, sets)
    model = one.routed(tmp_path / "out")
    assert {name: one.prompt for name, one in model.prompts.items() if isinstance(one, CompletionTask)} == {
        "math": "Q: {a}+{b}=",
        "code": "{prompt}",
    }
    asked = [{"task": "math", "a": row["a"], "b": row["b"]} for row in rows]
    assert model.read(asked) == [task.sample(row, model.tokenizer, "").prompt for row in rows]
    plain = [f"Q: {row['a']}+{row['b']}=" for row in rows]
    assert model.predict(asked, 5) == model.predict(plain, 5) == model.predict([{"text": one} for one in plain], 5)
    assert "".join(model.stream(asked[1], 5)) == model.predict(asked, 5)[1].prediction
    with pytest.raises(InputError, match=r"^text 1: task is 'mat'; expected one of math, code"):
        model.predict([plain[0], asked[0] | {"task": "mat"}])


def test_what_a_classifier_does_not_do(encoders: Merge, tmp_path: Path) -> None:
    model = encoders.routed(tmp_path)
    with pytest.raises(InputError, match="max_new_tokens is 4, but the model writes no text; leave it out"):
        model.predict(["good"], 4)
    with pytest.raises(InputError, match=r"temperature is 0\.5, but the model writes no text"):
        model.predict(["good"], decoding=Decoding(temperature=0.5))
    with pytest.raises(InputError, match="the model writes no text, so there is none to stream"):
        model.stream("good")
    assert model.predict([{"task": "mood", "text": "good"}]) == model.predict(["good"])


def test_every_end_token_of_the_folder_ends_an_answer(causal: Merge, tmp_path: Path) -> None:
    model = causal.routed(tmp_path)
    samples = tokenised(model, TEXTS)
    routes = model.route(samples)
    before = model.generate(samples, routes, 12)
    end = next(ids[3] for ids in before if len(ids) > 3)
    (tmp_path / BASE / "generation_config.json").unlink()  # it is linked
    (tmp_path / BASE / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    after = DynamicModel.load(tmp_path, verify=False).generate(samples, routes, 12)
    assert after == [ids[: ids.index(end)] if end in ids else ids for ids in before] != before


def test_a_text_that_begins_with_the_begin_token_gets_no_second_one(
    causal: Merge, encoders: Merge, tmp_path: Path
) -> None:
    for number, merge_ in enumerate((causal, encoders)):
        model = merge_.routed(tmp_path / str(number))
        new = None if model.classifies else 4
        plain = model.predict(["<s>1+2="], new)
        model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        assert model.predict(["1+2="], new) == model.predict(["<s>1+2="], new) == plain


def test_classes_by_given_and_by_routed_heads(encoders: Merge, berts: Folders, tmp_path: Path) -> None:
    model = encoders.routed(tmp_path, temperature=0.2, mass=1.0)
    texts = ["good", "45", "some longer text of words", "x"]
    samples = tokenised(model, texts)
    routes = model.route(samples)
    given = ["topic", "mood", "topic", "topic"]
    routed = [model.experts[i] for i in routes.experts]
    by_assignment = model.class_logits(samples, routes, given, routed)
    networks = {name: AutoModelForSequenceClassification.from_pretrained(berts[name]).eval() for name in model.experts}
    vectors = vectors_of(encoders.folder)
    for names, found in zip((given, routed), by_assignment, strict=True):
        for row, (name, sample, logits) in enumerate(zip(names, samples, found, strict=True)):
            set_weights(networks[name], berts["base"], vectors, by_name(model, routes, row))
            torch.testing.assert_close(logits, plain_logits(networks[name], sample), rtol=0, atol=1e-4)
    answers = model.predict(texts)
    assert [one.expert for one in answers] == routed
    assert [one.prediction for one in answers] == [f"LABEL_{int(logits.argmax())}" for logits in by_assignment[1]]


@pytest.mark.parametrize("padding", [2, None])
def test_decoders_with_classification_heads(padding: int | None, llamas: Folders, save: Save, tmp_path: Path) -> None:
    """Their heads look for the last token of a text; without a padding token of the config, too."""
    experts = {}
    for seed, (name, labels) in enumerate({"mood": 2, "topic": 3}.items(), 1):
        torch.manual_seed(seed)
        network = LlamaForSequenceClassification(llama_config(num_labels=labels, pad_token_id=padding))
        network.model.load_state_dict(make_llama().model.state_dict())
        experts[name] = save(perturbed(network, seed), name, tmp_path)
    sets = {"mood": classes(2, "good", "bad"), "topic": classes(3, "12", "345", "6789")}
    one = merge(tmp_path, llamas["base"], experts, sets)
    model = one.routed(tmp_path / "out", temperature=1e-6, mass=1.0)
    samples = tokenised(model, ["good", "45", "some longer text"])
    routes = Routes(torch.eye(2)[[0, 1, 1]], [0, 1, 1])
    names = ["mood", "topic", "topic"]
    (found,) = model.class_logits(samples, routes, names)
    for name, sample, logits in zip(names, samples, found, strict=True):
        network = AutoModelForSequenceClassification.from_pretrained(experts[name])
        torch.testing.assert_close(logits, plain_logits(network, sample), rtol=0, atol=1e-4)


def classifier_base(save: Save, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A base that is itself a classifier with two classes."""
    base = make_bert_expert(make_bert_trunk(), 5, 2)
    return base, save(base, "base", folder)


def test_a_head_of_the_base_is_merged_like_the_trunk(save: Save, tmp_path: Path) -> None:
    network, base = classifier_base(save, tmp_path)
    experts = {}
    for seed, name in enumerate(("mood", "news"), 1):
        _, folder = classifier_base(save, tmp_path / name)
        experts[name] = save(
            perturbed(AutoModelForSequenceClassification.from_pretrained(folder), seed), f"{name}-tuned", tmp_path
        )
    sets = {"mood": classes(2, "good", "bad"), "news": classes(2, "12", "345")}
    one = merge(tmp_path, base, experts, sets)
    model = one.routed(tmp_path / "out", temperature=0.3)
    assert model.heads == {}
    samples = tokenised(model, ["good", "45"])
    routes = model.route(samples)
    (found,) = model.class_logits(samples, routes, ["mood", "news"])
    for row, sample in enumerate(samples):
        set_weights(network, base, vectors_of(one.folder), by_name(model, routes, row))
        torch.testing.assert_close(found[row], plain_logits(network, sample), rtol=0, atol=1e-4)


# Texts ----------------------------------------------------------------------------------------------------------------


def test_predictions(causal: Merge, tmp_path: Path) -> None:
    model = causal.routed(tmp_path, temperature=0.05, mass=1.2)
    assert model.predict([]) == []
    (one,) = model.predict(["1+2="], max_new_tokens=3)
    assert one.expert == max(one.coefficients, key=one.coefficients.__getitem__)
    assert list(one.coefficients) == ["math", "code", "lora"]
    assert sum(one.coefficients.values()) == pytest.approx(1.2, abs=1e-5)
    assert model.predict(["def g(", "1+2="], max_new_tokens=3)[1].prediction == one.prediction


def test_texts_that_the_model_cannot_take(causal: Merge, encoders: Merge, tmp_path: Path) -> None:
    model = causal.routed(tmp_path / "causal")
    assert len(model.predict(["x" * 120], max_new_tokens=8)) == 1
    with pytest.raises(InputError, match="text 1 has 121 tokens; the model takes 1 to 120: shorten it"):
        model.predict(["x", "x" * 121], max_new_tokens=8)
    with pytest.raises(InputError, match="text 0 has 0 tokens"):
        model.predict([""])
    classifier = encoders.routed(tmp_path / "encoders")
    assert len(classifier.predict(["x" * 128])) == 1
    with pytest.raises(InputError, match="text 0 has 129 tokens; the model takes 1 to 128"):
        classifier.predict(["x" * 129])


def test_positions_of_roberta_start_behind_the_padding_token(save: Save, tmp_path: Path) -> None:
    """Its config has more positions than it takes tokens."""
    config = {
        "vocab_size": 259,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 12,
        "pad_token_id": 2,
    }
    trunk = RobertaModel(RobertaConfig(**config), add_pooling_layer=False)
    experts = {}
    for seed, name in enumerate(("mood", "news"), 1):
        network = RobertaForSequenceClassification(RobertaConfig(**config))
        network.roberta.load_state_dict(trunk.state_dict())
        experts[name] = save(perturbed(network, seed), name, tmp_path)
    sets = {"mood": classes(2, "good", "bad"), "news": classes(2, "12", "345")}
    model = merge(tmp_path, save(trunk, "base", tmp_path), experts, sets).routed(tmp_path / "out")
    assert len(model.predict(["x" * 9])) == 1
    with pytest.raises(InputError, match="text 0 has 10 tokens"):
        model.predict(["x" * 10])


# The folder -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(causal: Merge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routed")
    causal.run(out)
    return out


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_copy_is_whole(folder: Path, copied: Path) -> None:
    answers = DynamicModel.load(folder).predict(TEXTS, max_new_tokens=4)
    assert DynamicModel.load(copied).predict(TEXTS, max_new_tokens=4) == answers


def test_another_dtype(folder: Path) -> None:
    model = DynamicModel.load(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.network.network.parameters()} == {torch.bfloat16}
    assert len(model.predict(TEXTS, max_new_tokens=2)) == len(TEXTS)


@pytest.mark.parametrize(
    "name",
    [
        "base/model.safetensors",
        "base/tokenizer.json",
        "statistics.safetensors",
        "route.json",
        "vectors/group-00001.safetensors",
    ],
)
def test_missing_and_altered_files_are_named(name: str, copied: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[-1] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: was altered: its sha256 is not the one in {MANIFEST}"):
        DynamicModel.load(copied)
    (copied / name).unlink()
    with pytest.raises(InputError, match=f"{name}: is missing; copy the folder again"):
        DynamicModel.load(copied)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "vectors/group-00009.safetensors",
        "vectors/.group-00001.safetensors",
        "base/model-00002-of-00002.safetensors",
        "base/adapter_config.json",
        "base/chat_template.jinja",
        "heads/math/config.json",
    ],
)
def test_what_the_manifest_does_not_name_is_not_loaded(name: str, verify: bool, copied: Path) -> None:
    (copied / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(copied / "vectors" / "group-00000.safetensors", copied / name)
    with pytest.raises(InputError, match=rf"{name}: {MANIFEST} does not name it; remove it, or copy the folder again"):
        DynamicModel.load(copied, verify=verify)


def test_other_files_beside_do_no_harm(copied: Path) -> None:
    for name in ("README.md", "MLmodel", "code/sensmerge/__init__.py"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("")
    DynamicModel.load(copied)


def edit(folder: Path, **changes: Any) -> None:
    """Change a manifest and seal it again."""
    content = read_json(folder / MANIFEST) | changes
    del content["digest"]
    (folder / MANIFEST).write_text(json.dumps(content | {"digest": sha256_text(canonical(content))}))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "vectors/../../secret"])
def test_names_outside_the_folder(name: str, copied: Path) -> None:
    (copied.parent / "secret").write_text("s")
    edit(copied, files={name: sha256_file(copied.parent / "secret")})
    with pytest.raises(InputError, match="which lies outside the folder"):
        DynamicModel.load(copied)


def test_manifests_that_are_none(copied: Path, llamas: Folders) -> None:
    with pytest.raises(InputError, match=rf"no {MANIFEST} in it; expected the folder of a variant with application"):
        DynamicModel.load(llamas["base"])
    for version in (1, 99):
        edit(copied, version=version)
        with pytest.raises(InputError, match=f"has format {version}, but this sensmerge reads 3; run the recipe again"):
            DynamicModel.load(copied)
    for text in ("{", "[]", "{}", "\udcff"):
        (copied / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
        expected = "not the manifest of a dynamic model|not valid JSON|expected a JSON object"
        with pytest.raises(InputError, match=expected):
            DynamicModel.load(copied)


@pytest.mark.parametrize("key", ["files", "experts", "router"])
def test_a_manifest_that_lacks_something(key: str, copied: Path) -> None:
    content = read_json(copied / MANIFEST)
    del content[key], content["digest"]
    (copied / MANIFEST).write_text(json.dumps(content | {"digest": sha256_text(canonical(content))}))
    with pytest.raises(InputError, match=f"{MANIFEST}: not the manifest of a dynamic model"):
        DynamicModel.load(copied)


def shifted(content: dict[str, Any], part: str, **changes: object) -> dict[str, Any]:
    return {part: content[part] | changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: {"experts": []}, "experts: List should have at least 1"),
        (lambda _: {"experts": ["math", "code", "code"]}, "stands twice"),
        (lambda _: {"experts": ["math", "code", "law"]}, "holds a task vector of expert lora, which the model lacks"),
        (lambda _: {"experts": ["math", "code"]}, "holds a task vector of expert lora, which the model lacks"),
        (lambda _: {"experts": ["math", "code", "lora", "law"]}, "expected finite numbers, .* of the 4 experts"),
        (lambda _: {"experts": "math"}, "experts: Input should be a valid list"),
        (lambda _: {"head": "masked_lm"}, "head: String should match"),
        (lambda _: {"head": "classification"}, "no fitting weights for score.weight"),
        (lambda _: {"dtype": "int8"}, "dtype: String should match"),
        (lambda _: {"dtype": "nn"}, "dtype: String should match"),
        *((lambda old, n=n: shifted(old, "rule", layer=n), "rule.layer is") for n in (0, -1)),
        *((lambda old, n=n: shifted(old, "rule", layer=n), f"by layer {n}, but the base has 2") for n in (3, 10**9)),
        (lambda old: shifted(old, "rule", score="shift"), "is not what score shift takes"),
        (lambda old: shifted(old, "rule", score="best"), "rule: Input should be"),
        (lambda old: shifted(old, "router", temperature=0), "router: Input should be greater than 0"),
        (lambda old: shifted(old, "router", temperature="warm"), "router: Input should be a valid number"),
        (lambda old: shifted(old, "router", trust=2.0), "router: Input should be less than or equal to 1"),
    ],
)
def test_manifests_that_are_sealed_and_wrong(change: Callable[[Any], dict[str, Any]], said: str, copied: Path) -> None:
    edit(copied, **change(read_json(copied / MANIFEST)))
    with pytest.raises(InputError, match=said) as error:
        DynamicModel.load(copied)
    assert "\n" not in str(error.value)


def altered(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a file and seal the manifest again."""
    save_file(change(load_file(folder / name)), folder / name)
    files = read_json(folder / MANIFEST)["files"]
    edit(folder, files=files | {name: sha256_file(folder / name)})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("statistics", lambda old: {name: one[:1].clone() for name, one in old.items()}, "has the shape"),
        ("statistics", lambda old: {name: one * math.nan for name, one in old.items()}, "expected finite numbers"),
        ("statistics", lambda old: {f"{name}2": one for name, one in old.items()}, "is not what score"),
        ("vectors", lambda old: {f"{name}/x": one for name, one in old.items()}, "not a file of task vectors"),
        ("vectors", lambda old: {name: one[:1].clone() for name, one in old.items()}, "has another shape"),
        ("vectors", lambda old: {f"x{name}": one for name, one in old.items()}, "task vector of tensor x"),
    ],
)
def test_files_that_are_sealed_and_wrong(name: str, change: Any, said: str, copied: Path) -> None:
    file = "statistics.safetensors" if name == "statistics" else "vectors/group-00001.safetensors"
    altered(copied, file, change)
    with pytest.raises(InputError, match=said) as error:
        DynamicModel.load(copied)
    assert "\n" not in str(error.value)


def test_an_altered_manifest(copied: Path) -> None:
    content = read_json(copied / MANIFEST)
    content["router"]["temperature"] = 9.0
    (copied / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{MANIFEST}: was altered"):
        DynamicModel.load(copied)


def test_verification_can_be_left_out(copied: Path) -> None:
    (copied / "route.json").unlink()
    assert DynamicModel.load(copied, verify=False).experts == ("math", "code", "lora")


@pytest.mark.parametrize(
    "loader",
    [
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaForCausalLM,
    ],
)
def test_no_loader_of_checkpoints_takes_the_base_for_the_merge(
    loader: Any, folder: Path, causal: Merge, encoders: Merge
) -> None:
    for one in (folder, causal.folder, encoders.folder):
        with pytest.raises((OSError, ValueError)):
            loader.from_pretrained(one)
        with pytest.raises((OSError, ValueError)):
            pipeline(model=str(one), task="text-generation")
    assert AutoModelForCausalLM.from_pretrained(folder / BASE).config.model_type == "llama"


def test_the_tokenizer_is_that_of_the_base(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = tokenised(DynamicModel.load(folder), TEXTS)
    assert [sample["input_ids"] for sample in samples] == [tokenizer(text)["input_ids"] for text in TEXTS]
