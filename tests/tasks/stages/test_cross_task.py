import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.stages import cross_task as module
from tests.conftest import (
    TaskRows,
    cross_task_job,
    do_job,
    make_adapter,
    make_bert_expert,
    make_bert_trunk,
    make_gpt2,
    make_llama,
    perturbed,
)

Save = Callable[..., Path]
Distances = dict[str, dict[str, float]]
TEXTS = {
    "math": ["1+2=3", "7*6=42", "2+2=4"],
    "code": ["def f(x): return x + 1", "print('a rather long line of text, longer than one chunk')", "x"],
    "talk": ["hello"],
}


def completions(names: list[str], loss_on: str = "completion") -> dict[str, TaskRows]:
    task = CompletionTask(kind="completion", prompt="{text}", completion="!", loss_on=loss_on)
    return {name: TaskRows(task, [{"text": text} for text in TEXTS[name]]) for name in names}


def classes(names: list[str]) -> dict[str, TaskRows]:
    task = ClassificationTask(kind="classification")
    rows = [{"text": text, "label": 0} for text in ("good", "a much longer text than the first")]
    return {name: TaskRows(task, rows[: i + 1]) for i, name in enumerate(names)}


def measure(
    base: Path,
    experts: Mapping[str, Path],
    sets: Mapping[str, TaskRows],
    out: Path,
    known: Mapping[str, float] | None = None,
    kept: Mapping[str, Path] | None = None,
) -> Distances:
    out.mkdir(exist_ok=True)
    found = do_job(cross_task_job(base, experts, sets, known=known or {}, kept=kept or {}), out)
    distances: Distances = read_json(out / "distances.json")
    apart = [g for i, row in distances.items() for j, g in row.items() if i != j]
    assert found == {"min": min(apart), "max": max(apart), "measured": len(apart) - len(known or {})}
    trunks = {f"trunks/{i}/{j}" for i in sets for j, one in sets.items() if isinstance(one.task, ClassificationTask)}
    files = {"distances.json", "pairs.json", *(f"{one}/head_inputs.safetensors" for one in trunks)}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == files
    assert (out / "trunks").exists() == bool(trunks)
    return distances


def naive(logits: Callable[[str, str, str], torch.Tensor], texts: Mapping[str, list[str]]) -> Distances:
    """All logits of all experts on all samples; `logits(i, j, text)` of expert i on task j's text, float64 (T, V)."""
    distances: Distances = {i: {} for i in texts}
    for j, samples in texts.items():
        for i in texts:
            norms = [(logits(i, j, text) - logits(j, j, text)).square().sum(-1).sqrt().mean() for text in samples]
            distances[i][j] = float(torch.stack(norms).mean())
    return distances


def same(found: Distances, expected: Distances) -> None:
    for i, row in expected.items():
        assert found[i] == pytest.approx(row, rel=1e-4)
        assert found[i][i] == 0.0


def causal_logits(
    networks: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, end: bool = True
) -> Callable[[str, str, str], torch.Tensor]:
    def logits(i: str, _: str, text: str) -> torch.Tensor:
        ids = tokenizer(text + "!")["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            return networks[i].double().eval()(torch.tensor([ids])).logits[0]

    return logits


@pytest.fixture(params=[5, 256], ids=["chunks", "whole"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "CHUNK_TOKENS", request.param)
    return int(request.param)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize(("names", "tied"), [(["math", "code"], True), (["math", "code", "talk"], False)])
def test_llama(
    names: list[str],
    tied: bool,
    loss_on: str,
    chunk: int,
    save: Save,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    base = save(make_llama(tie_word_embeddings=tied), "base", tmp_path)
    experts = {
        name: save(perturbed(make_llama(tie_word_embeddings=tied), seed), name, tmp_path)
        for seed, name in enumerate(names, 1)
    }
    found = measure(base, experts, completions(names, loss_on), tmp_path / "out")
    networks = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in experts.items()}
    same(found, naive(causal_logits(networks, tokenizer), {name: TEXTS[name] for name in names}))


def test_gpt2(chunk: int, save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    names = ["math", "code"]
    experts = {name: save(perturbed(make_gpt2(), seed), name, tmp_path) for seed, name in enumerate(names, 1)}
    found = measure(save(make_gpt2(), "base", tmp_path), experts, completions(names), tmp_path / "out")
    networks = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in experts.items()}
    same(found, naive(causal_logits(networks, tokenizer), {name: TEXTS[name] for name in names}))


def own_head_logits(
    trunks: Mapping[str, PreTrainedModel], heads: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Callable[[str, str, str], torch.Tensor]:
    """Logits of task j's classifier, its trunk's weights being those of expert i."""

    def logits(i: str, j: str, text: str) -> torch.Tensor:
        network = heads[j].double().eval()
        network.base_model.load_state_dict(trunks[i].double().state_dict())
        with torch.no_grad():
            return network(torch.tensor([tokenizer(text)["input_ids"]])).logits

    return logits


def test_classifiers_compare_through_the_head_of_the_task(
    chunk: int, save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trunk = make_bert_trunk()
    labels = {"mood": 2, "topic": 5, "noun": 2}
    experts = {name: make_bert_expert(trunk, seed, n) for seed, (name, n) in enumerate(labels.items(), 1)}
    folders = {name: save(network, name, tmp_path) for name, network in experts.items()}
    sets = classes(list(labels))
    found = measure(save(trunk, "base", tmp_path), folders, sets, tmp_path / "out")
    trunks = {name: AutoModelForSequenceClassification.from_pretrained(folders[name]).bert for name in labels}
    heads = {name: AutoModelForSequenceClassification.from_pretrained(folders[name]) for name in labels}
    texts = {name: [row["text"] for row in one.rows] for name, one in sets.items()}
    same(found, naive(own_head_logits(trunks, heads, tokenizer), texts))


def test_classifiers_whose_heads_read_differently(
    chunk: int, save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def config(pooling: str) -> ModernBertConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        tokens = {"cls_token_id": 0, "sep_token_id": 1, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
        return ModernBertConfig(vocab_size=259, classifier_pooling=pooling, num_labels=3, **sizes, **tokens)

    torch.manual_seed(0)
    trunk = ModernBertModel(config("cls"))
    poolings = {"mood": "cls", "topic": "mean", "noun": "mean"}
    folders = {}
    for seed, (name, pooling) in enumerate(poolings.items(), 1):
        network = ModernBertForSequenceClassification(config(pooling))
        network.model.load_state_dict(trunk.state_dict())
        folders[name] = save(perturbed(network, seed), name, tmp_path)
    sets = classes(list(poolings))
    base, out = save(trunk, "base", tmp_path), tmp_path / "out"
    do_job(cross_task_job(base, folders, sets), out)
    heads = {name: AutoModelForSequenceClassification.from_pretrained(folders[name]) for name in poolings}
    trunks = {name: AutoModelForSequenceClassification.from_pretrained(folders[name]).model for name in poolings}
    texts = {name: [row["text"] for row in one.rows] for name, one in sets.items()}
    same(read_json(out / "distances.json"), naive(own_head_logits(trunks, heads, tokenizer), texts))
    # Means are taken over all tokens, which are not kept.
    kept = {file.relative_to(out).as_posix() for file in (out / "trunks").rglob("*") if file.is_file()}
    assert kept == {f"trunks/{name}/mood/head_inputs.safetensors" for name in poolings}


def test_classifiers_with_decoder_trunks(
    chunk: int, save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = save(make_llama(), "base", tmp_path)
    labels = {"mood": 2, "topic": 3}

    def network(name: str) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels[name])

    folders = {
        name: make_adapter(
            network(name), tmp_path / name, seed, task_type="SEQ_CLS", target_modules=["v_proj", "gate_proj"]
        )
        for seed, name in enumerate(labels, 1)
    }
    sets = classes(list(labels))
    found = measure(base, folders, sets, tmp_path / "out")
    full = {name: PeftModel.from_pretrained(network(name), folders[name]).merge_and_unload() for name in labels}
    trunks = {name: AutoModelForCausalLM.from_pretrained(base).model for name in labels}
    for name in labels:
        trunks[name].load_state_dict(full[name].model.state_dict())
    texts = {name: [row["text"] for row in one.rows] for name, one in sets.items()}
    same(found, naive(own_head_logits(trunks, full, tokenizer), texts))


def test_classifiers_with_decoder_trunks_and_no_padding_token(
    save: Save, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = make_llama()
    base.config.pad_token_id = None
    folder, networks = save(base, "base", tmp_path), {}
    for seed, name in enumerate(("mood", "topic"), 1):
        network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=seed + 1)
        networks[name] = perturbed(network, seed)
    folders = {name: save(network, name, tmp_path) for name, network in networks.items()}
    rows = [{"text": text, "label": 0} for text in ("good", "evil")]  # of one length, so that they could be one batch
    sets = {name: TaskRows(ClassificationTask(kind="classification"), rows) for name in networks}
    found = measure(folder, folders, sets, tmp_path / "out")
    trunks = {name: AutoModelForSequenceClassification.from_pretrained(folders[name]).model for name in networks}
    texts = {name: ["good", "evil"] for name in networks}
    same(found, naive(own_head_logits(trunks, networks, tokenizer), texts))


def test_identical_experts_lie_nowhere_apart(llamas: dict[str, Path], tmp_path: Path) -> None:
    experts = {"math": llamas["math"], "code": llamas["math"]}
    assert measure(llamas["base"], experts, completions(["math", "code"]), tmp_path / "out") == {
        i: {"math": 0.0, "code": 0.0} for i in ("math", "code")
    }


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an entry with every forward pass of a trunk: the number of samples."""
    made: list[int] = []
    forward = LlamaModel.forward

    def counted(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        made.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return made


def batches(task: str) -> int:
    """Return in how many batches a task's samples are run: those of one length together."""
    return len({len(text) for text in TEXTS[task]})


def test_each_trunk_runs_once_over_each_sample(llamas: dict[str, Path], tmp_path: Path, passes: list[int]) -> None:
    experts = {"math": llamas["math"], "code": llamas["code"], "talk": llamas["base"]}
    sets = completions(list(experts))
    measure(llamas["base"], experts, sets, tmp_path / "out")
    assert sum(passes) == len(experts) * sum(len(one.rows) for one in sets.values())
    assert len(passes) == len(experts) * sum(map(batches, experts))


def test_known_distances_are_taken_over_bit_for_bit(llamas: dict[str, Path], tmp_path: Path, passes: list[int]) -> None:
    """After a change of one expert of K, the pairs that it is part of are measured, in 3K − 2 passes over sets."""
    experts = {"math": llamas["math"], "code": llamas["code"], "talk": llamas["base"]}
    sets = completions(list(experts))
    whole = measure(llamas["base"], experts, sets, tmp_path / "whole")
    known = module.known_distances(tmp_path / "whole")
    job = cross_task_job(llamas["base"], experts, sets)
    assert known == {job.pair(i, j): whole[i][j] for i in experts for j in experts if i != j}
    kept = {job.pair(i, j): whole[i][j] for i in experts for j in experts if i != j and "code" not in (i, j)}
    passes.clear()
    assert measure(llamas["base"], experts, sets, tmp_path / "again", kept) == whole
    assert len(passes) == 3 * batches("code") + 2 * batches("math") + 2 * batches("talk")
    passes.clear()
    assert measure(llamas["base"], experts, sets, tmp_path / "all", known) == whole
    assert not passes


def test_trunks_that_were_kept_save_passes(save: Save, tmp_path: Path) -> None:
    """After a change of one of K classifiers only its own trunk runs, over all calibration sets."""
    trunk = make_bert_trunk()
    labels = {"mood": 2, "topic": 5, "noun": 2}
    base = save(trunk, "base", tmp_path)
    experts = {n: save(make_bert_expert(trunk, seed, k), n, tmp_path) for seed, (n, k) in enumerate(labels.items(), 1)}
    sets = classes(list(labels))
    measure(base, experts, sets, tmp_path / "before")
    job = cross_task_job(base, experts, sets)
    known, files = module.known_distances(tmp_path / "before"), module.kept_trunks(tmp_path / "before")
    kept = {module.fingerprint_of(file): file for file in files}
    assert set(kept) == {job.trunk(i, j) for i in labels for j in labels}
    assert module.kept_trunks(tmp_path) == []
    experts["topic"] = save(make_bert_expert(trunk, 9, 5), "other", tmp_path)
    whole = measure(base, experts, sets, tmp_path / "whole")
    job = cross_task_job(base, experts, sets)
    known = {job.pair(i, j): known[job.pair(i, j)] for i, j in (("mood", "noun"), ("noun", "mood"))}
    kept = {job.trunk(i, j): kept[job.trunk(i, j)] for i in ("mood", "noun") for j in labels}
    job = replace(job, known=known, kept=kept)
    assert {name: job.looked_at(name) for name in labels} == {"mood": [], "topic": list(labels), "noun": []}
    assert measure(base, experts, sets, tmp_path / "again", known, kept) == whole
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        again = load_file(tmp_path / "again" / file.relative_to(tmp_path / "whole"))
        assert {key: tensor.tolist() for key, tensor in load_file(file).items()} == {
            key: tensor.tolist() for key, tensor in again.items()
        }


def test_a_trunk_that_was_stopped_goes_on_where_it_was(
    llamas: dict[str, Path], tmp_path: Path, passes: list[int]
) -> None:
    experts = {"math": llamas["math"], "code": llamas["code"], "talk": llamas["base"]}
    sets = completions(list(experts))
    whole = measure(llamas["base"], experts, sets, tmp_path / "whole")
    job = cross_task_job(llamas["base"], experts, sets)
    out = tmp_path / "out"
    # The first time only what `talk` and `code` have to do with each other is wanted.
    some = {job.pair(i, j): 0.0 for i in experts for j in experts if "math" in (i, j)}
    passes.clear()
    assert replace(job, known=some).run("code", out)
    assert len(passes) == batches("code") + batches("talk")
    (out / "trunks" / "code" / "math.partial").mkdir()  # as one that was killed leaves it
    passes.clear()
    assert job.run("code", out)
    assert len(passes) == batches("math")
    assert not job.run("code", out)
    do_job(job, out)
    assert read_json(out / "distances.json") == whole


def test_logits_exist_for_one_chunk_of_tokens(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 5)
    shapes = []
    forward = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        if self.out_features == 259:
            shapes.append(tuple(y.shape))
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    experts = {name: llamas[name] for name in ("math", "code")}
    measure(llamas["base"], experts, completions(list(experts)), tmp_path / "out")
    lengths = [len(text) + 2 for name in experts for text in TEXTS[name]]
    assert {shape[1] for shape in shapes} <= {1, 2, 3, 4, 5}
    assert sum(shape[1] for shape in shapes) == len(experts) * sum(lengths)


def test_logits_that_are_no_numbers(save: Save, llamas: dict[str, Path], tmp_path: Path) -> None:
    broken = make_llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.inf)
    experts = {"math": llamas["math"], "code": save(broken, "code", tmp_path)}
    with pytest.raises(InputError, match=r"tasks\.\w+\.calibration: the distance of experts\.\w+ from experts\.\w+ is"):
        measure(llamas["base"], experts, completions(["math", "code"]), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
