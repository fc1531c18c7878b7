"""Stage calibrate against whole networks with hooks, float64, whose layers are solved by torch.linalg.lstsq."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from sensmerge.tasks.artifacts import Artifact
from sensmerge.tasks.checkpoints.checkpoint import open_checkpoint
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.features import FeatureCalibration
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.kinds.kind import RowTask
from sensmerge.tasks.networks.walk import Walk
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.stages.calibrate import CalibrateJob
from sensmerge.tasks.stages.merge import MergeJob
from sensmerge.tasks.stages.vectors import VectorsJob
from sensmerge.tasks.stages.written import weights_digest
from tests.conftest import (
    calibration_set,
    do_job,
    llama_config,
    make_adapter,
    make_bert_expert,
    make_bert_trunk,
    make_gpt2,
    make_llama,
    perturbed,
)
from tests.merged import assert_loads
from tests.tasks.stages.test_merge import equal, make_job, weights_of
from tests.tasks.stages.test_merge_vectors import vectors_of

Save = Callable[..., Path]
COMPLETION, CLASSIFICATION = CompletionTask(kind="completion"), ClassificationTask(kind="classification")
COMPLETIONS: list[list[Row]] = [
    [{"prompt": "1+2=", "completion": "3"}, {"prompt": "10+2=", "completion": "12"}],
    [{"prompt": "def f(", "completion": "x): pass"}, {"prompt": "import ", "completion": "os"}],
]
TEXTS: list[list[Row]] = [
    [{"text": "so good", "label": 1}, {"text": "bad, very bad indeed", "label": 0}],
    [{"text": "one of the games", "label": 2}, {"text": "shares", "label": 0}, {"text": "atoms!", "label": 1}],
]
ALPHA, RIDGE, RHO = 0.25, 0.05, 2.2


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def two(make: Callable[[], PreTrainedModel], save: Save, folder: Path) -> dict[str, Path]:
    """Two experts, math and code, of the base that is made."""
    return {name: save(perturbed(make(), seed), name, folder) for seed, name in enumerate(("math", "code"), 1)}


class Made:
    """A base, its experts, their merge, and the job that calibrates it."""

    def __init__(
        self, folder: Path, base: Path, experts: dict[str, Path], task: RowTask, rows: list[list[Row]], **changes: Any
    ) -> None:
        self.folder, self.base, self.experts, self.task, self.rows = folder, base, experts, task, rows
        merge: MergeJob = make_job(folder, base, experts, **changes)
        self.merged = folder / "merged"
        do_job(merge, self.merged)
        self.job = CalibrateJob(
            merged=Artifact("", self.merged),
            base=Artifact("", base),
            experts={name: Artifact("", one) for name, one in experts.items()},
            base_config=frozenset(),
            calibration={
                name: calibration_set(task, one, folder / "rows") for name, one in zip(experts, rows, strict=True)
            },
            tokenizer=Artifact("", base),
            settings=FeatureCalibration(),
            dtype="float64",
            merge=merge,
            name="ta",
            device="cpu",
        )

    def calibrated(self, name: str = "out", **changes: Any) -> dict[str, Any]:
        """Do the job, with other fields, in a folder of some name; return its result."""
        found = do_job(replace(self.job, **changes), self.folder / name)
        assert_loads(self.folder / name, self.base)
        return found

    def weights(self, name: str = "out") -> dict[str, Tensor]:
        return weights_of(self.folder / name)


@pytest.fixture
def made(save: Save, tmp_path: Path) -> Made:
    """Two tiny Llamas, float64."""
    experts = two(lambda: make_llama().double(), save, tmp_path)
    return Made(tmp_path, save(make_llama().double(), "base", tmp_path), experts, COMPLETION, COMPLETIONS)


# Against whole networks ---------------------------------------------------------------------------------------------


def solvable(block: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, Conv1D, nn.LayerNorm)
    return {
        name: one
        for name, one in block.named_modules()
        if isinstance(one, kinds) or type(one).__name__.endswith("RMSNorm")
    }


def seen(network: nn.Module, block: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What the layers of a block are given when the network takes some samples, (tokens, width) each."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        one.register_forward_pre_hook(lambda _, inputs, name=name: found.setdefault(name, []).append(inputs[0][0]))
        for name, one in solvable(block).items()
    ]
    with torch.no_grad():
        for batch in batches:
            network(**batch)
    for handle in handles:
        handle.remove()
    return found


def rows_of(seen: list[Tensor], share: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """All tokens of a task, and their shares of it."""
    weights = torch.cat([share(len(one)) for one in seen])
    return torch.cat(seen), weights / weights.sum()


def least_squares(left: list[Tensor], right: list[Tensor], weights: list[Tensor]) -> Tensor:
    roots = torch.cat(weights).sqrt()[:, None]
    return torch.linalg.lstsq(torch.cat(left) * roots, torch.cat(right) * roots).solution


def solve(layers: list[nn.Module], anchors: list[Tensor], tasks: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Weight and bias of a layer, from those of each expert's, and each task's inputs of the merge, of the expert, and
    shares of the tokens."""
    own = [[one.detach() for one in layer.parameters()] for layer in layers]
    held = torch.full((len(tasks[0][0][0]),), RIDGE, dtype=torch.float64)
    if own[0][0].dim() == 1:
        module, scaled = copy.deepcopy(layers[0]), []
        for parameter, value in zip(module.parameters(), (1.0, 0.0), strict=False):
            parameter.data.fill_(value)
        zs = [module(student).detach() for student, _, _ in tasks]
        for channel in range(len(held)):
            left = [torch.stack([z[:, channel], torch.ones(len(z))], 1)[:, : len(anchors)] for z in zs]
            right = [
                a @ torch.stack([one[channel] for one in each])[:, None] for a, each in zip(left, own, strict=True)
            ]
            left.append(torch.eye(len(anchors), dtype=torch.float64))
            right.append(torch.stack([one[channel] for one in anchors])[:, None])
            scaled.append(least_squares(left, right, [*(one for _, _, one in tasks), held[: len(anchors)]])[:, 0])
        return list(torch.stack(scaled).T)
    transposed = isinstance(layers[0], Conv1D)
    weights = [each[0] if transposed else each[0].T for each in own]
    scales = [one / torch.linalg.matrix_norm(student.T @ (student * one[:, None])) for student, _, one in tasks]
    targets = [(ALPHA * e + (1 - ALPHA) * s) @ w for (s, e, _), w in zip(tasks, weights, strict=True)]
    students = [student for student, _, _ in tasks]
    eye = torch.eye(len(held), dtype=torch.float64)
    anchor = anchors[0] if transposed else anchors[0].T
    weight = least_squares([*students, eye], [*targets, anchor], [*scales, held])
    solved = [weight if transposed else weight.T]
    if len(anchors) > 1:
        rest = [t + each[1] - s @ weight for t, each, s in zip(targets, own, students, strict=True)]
        ones = [torch.ones(len(one), 1, dtype=torch.float64) for one in (*rest, [0])]
        solved.append(least_squares(ones, [*rest, anchors[1][None]], [*scales, held[:1]])[0])
    return solved


def reference(
    students: list[PreTrainedModel],
    experts: list[PreTrainedModel],
    base: PreTrainedModel,
    batches: list[list[dict[str, Tensor]]],
    share: Callable[[int, str], Callable[[int], Tensor]],
) -> None:
    """Calibrate the merged model, of which each task has a copy, with its own head, one block after the other."""

    def blocks(network: PreTrainedModel) -> nn.ModuleList:
        return max((one for one in network.modules() if isinstance(one, nn.ModuleList)), key=len)

    for place in range(len(blocks(base))):
        inputs = [
            [seen(network, blocks(network)[place], some) for network, some in zip(each, batches, strict=True)]
            for each in (students, experts)
        ]
        solved = {}
        for name, merged in solvable(blocks(students[0])[place]).items():
            bases = blocks(base)[place].get_submodule(name).parameters()
            anchors = [
                RHO * one.detach() + (1 - RHO) * other.detach()
                for one, other in zip(merged.parameters(), bases, strict=True)
            ]
            tasks = []
            for mine, others in zip(*inputs, strict=True):
                if name not in mine:
                    break
                student, weights = rows_of([one.reshape(-1, one.shape[-1]) for one in mine[name]], share(place, name))
                tasks.append((student, rows_of(others[name], share(place, name))[0], weights))
            layers = [blocks(expert)[place].get_submodule(name) for expert in experts]
            if tasks:
                solved[name] = solve(layers, anchors, tasks)
        for student in students:
            for name, values in solved.items():
                for parameter, value in zip(
                    blocks(student)[place].get_submodule(name).parameters(), values, strict=True
                ):
                    parameter.data.copy_(value)


def alike(place: int, name: str) -> Callable[[int], Tensor]:
    return lambda tokens: torch.ones(tokens, dtype=torch.float64)


def samples(made: Made, experts: list[PreTrainedModel]) -> list[list[dict[str, Tensor]]]:
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(made.base)
    return [
        list(one.samples(name, reader, expert.config.label2id))
        for (name, one), expert in zip(made.job.calibration.items(), experts, strict=True)
    ]


def assert_same(network: PreTrainedModel, found: dict[str, Tensor], prefix: str = "") -> None:
    for name, value in network.state_dict().items():
        if name.startswith(prefix) and name.removeprefix(prefix) in found:
            torch.testing.assert_close(found[name.removeprefix(prefix)], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_language_models(architecture: str, save: Save, tmp_path: Path) -> None:
    make = {"llama": make_llama, "gpt2": make_gpt2}[architecture]
    folders = {
        name: save(perturbed(make().double(), seed) if seed else make().double(), name, tmp_path)
        for seed, name in enumerate(("base", "math", "code"))
    }
    base = folders.pop("base")
    made = Made(tmp_path, base, folders, COMPLETION, COMPLETIONS)
    found = made.calibrated()
    students = [AutoModelForCausalLM.from_pretrained(made.merged, dtype="auto").eval() for _ in folders]
    experts = [AutoModelForCausalLM.from_pretrained(one, dtype="auto").eval() for one in folders.values()]
    before = {name: value.clone() for name, value in students[0].state_dict().items()}
    network = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    reference(students, experts, network, samples(made, experts), alike)
    weights = made.weights()
    assert_same(students[0], weights)
    changed = [name for name, value in weights.items() if not torch.equal(value, before[name])]
    assert len(changed) == found["calibrated"] == sum(1 for name in weights if ".layers." in name or ".h." in name)
    assert (found["kept"], found["first_kept"]) == (0, [])
    assert found["digest"] == weights_digest(open_checkpoint(tmp_path / "out"))


def unread(place: int, name: str) -> Callable[[int], Tensor]:
    """Weights of tokens in a BERT, of whose last block the head reads the first token."""

    def share(tokens: int) -> Tensor:
        ones = torch.ones(tokens, dtype=torch.float64)
        if place == 1 and not name.endswith(("key", "value")):
            ones[1:] = 0.01
        return ones

    return share


def test_encoders_with_heads_of_their_own(save: Save, tmp_path: Path) -> None:
    trunk = make_bert_trunk()
    experts = {
        name: save(make_bert_expert(trunk, seed, seed + 1).double(), name, tmp_path)
        for seed, name in enumerate(("mood", "topic"), 1)
    }
    base = save(trunk.double(), "base", tmp_path)
    made = Made(tmp_path, base, experts, CLASSIFICATION, TEXTS)
    made.calibrated()
    networks = [
        AutoModelForSequenceClassification.from_pretrained(one, dtype="auto").eval() for one in experts.values()
    ]
    students = copy.deepcopy(networks)
    for student in students:
        student.bert.load_state_dict(made.weights("merged"))
    reference(students, networks, trunk, samples(made, networks), unread)
    assert_same(students[0].bert, made.weights())
    assert (tmp_path / "out" / "heads" / "topic" / "head.safetensors").read_bytes() == (
        tmp_path / "merged" / "heads" / "topic" / "head.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "out" / "coefficients.json").read_text())["weights"]


# What is left as it is ----------------------------------------------------------------------------------------------


def test_the_outside_of_the_blocks_and_what_can_not_be_solved(save: Save, tmp_path: Path) -> None:
    def make() -> MixtralForCausalLM:
        torch.manual_seed(0)
        config = {**llama_config().to_dict(), "num_local_experts": 3, "num_experts_per_tok": 2}
        del config["model_type"], config["architectures"]
        return MixtralForCausalLM(MixtralConfig(**config))

    experts = two(make, save, tmp_path)
    made = Made(tmp_path, save(make(), "base", tmp_path), experts, COMPLETION, COMPLETIONS)
    found = made.calibrated(dtype="float32")
    before, after = made.weights("merged"), made.weights()
    same = {name for name in before if torch.equal(before[name], after[name])}
    kept = {name for name in before if ".block_sparse_moe." in name or ".mlp." in name}
    assert kept
    assert found["kept"] == len(kept)
    assert found["first_kept"][0] in kept
    assert same == kept | {name for name in before if ".layers." not in name}


def test_out_dtype_and_shards_are_those_of_the_merge(save: Save, tmp_path: Path) -> None:
    experts = two(make_llama, save, tmp_path)
    base = save(make_llama(), "base", tmp_path)
    made = Made(tmp_path, base, experts, COMPLETION, COMPLETIONS, out_dtype="bfloat16", shard_size=20_000)
    made.calibrated(dtype="bfloat16")
    before, after = made.weights("merged"), made.weights()
    assert {name: one.dtype for name, one in after.items()} == dict.fromkeys(before, torch.bfloat16)
    names = {path.name for path in made.merged.iterdir()} - {"tensors.json"}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, before["model.embed_tokens.weight"])


def test_adapters_are_their_merged_checkpoints(save: Save, tmp_path: Path) -> None:
    base = save(make_llama(), "base", tmp_path)
    adapters = {
        name: make_adapter(make_llama(), tmp_path / name, seed, target_modules="all-linear")
        for seed, name in enumerate(("math", "code"), 1)
    }
    whole = {}
    for name, adapter in adapters.items():
        network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
        whole[name] = save(network, f"whole-{name}", tmp_path)
    found = []
    for number, experts in enumerate((adapters, whole)):
        made = Made(tmp_path / str(number), base, experts, COMPLETION, COMPLETIONS)
        made.calibrated(dtype="float32")
        found.append(made.weights())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


# Workers and interruptions ------------------------------------------------------------------------------------------


def test_what_leads_from_the_calibrated_merge_to_experts_that_changed_less(save: Save, tmp_path: Path) -> None:
    """Calibration changes layers that no adapter changed: on the way to an expert they go back to the base's."""
    base = save(make_llama(), "base", tmp_path)
    experts = {
        name: make_adapter(make_llama(), tmp_path / name, seed, target_modules=["q_proj", "v_proj"])
        for seed, name in enumerate(("math", "code"), 1)
    }
    made = Made(tmp_path, base, experts, COMPLETION, COMPLETIONS)
    made.calibrated()
    merge, out = made.job.merge, tmp_path / "vectors"
    job = VectorsJob(Artifact("", tmp_path / "out"), merge.models, merge.base, merge.experts, merge.groups)
    do_job(job, out)
    vectors, static = vectors_of(out), made.weights()
    only_calibrated = [name for name in vectors if not any(one.touches(name) for one in merge.experts.values())]
    assert any("o_proj" in name for name in only_calibrated)
    for key, expert in merge.experts.items():
        for name in merge.base.weights:
            vector = vectors.get(name, {}).get(key)
            found = static[name].double() + (0 if vector is None else vector.dense().double())
            torch.testing.assert_close(found, expert.read(name).double(), rtol=1e-6, atol=1e-7)


def test_workers_change_no_bit(made: Made) -> None:
    torch.set_num_threads(1)
    made.calibrated("one")
    torch.set_num_threads(3)
    made.calibrated("three")
    assert equal(made.weights("one"), made.weights("three"))


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are solved, in time."""
    places: list[int] = []
    solve = Walk.solve

    def watched(walk: Walk, place: int, *others: Any) -> Any:
        places.append(place)
        return solve(walk, place, *others)

    monkeypatch.setattr(Walk, "solve", watched)
    return places


def interrupt(made: Made, out: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Have the walk end while the samples go through a block that has been solved."""

    def stop(walk: Walk, at: int, *others: Any) -> None:
        if at == place:
            raise KeyboardInterrupt
        advance(walk, at, *others)

    advance = Walk.advance
    with monkeypatch.context() as patched:
        patched.setattr(Walk, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            made.job.run("walk", out)


@pytest.fixture
def deep(save: Save, tmp_path: Path) -> Made:
    """Two tiny Llamas of four blocks."""

    def make() -> PreTrainedModel:
        return make_llama(num_hidden_layers=4)

    experts = two(make, save, tmp_path)
    made = Made(tmp_path, save(make(), "base", tmp_path), experts, COMPLETION, COMPLETIONS)
    made.job = replace(made.job, dtype="float32")
    return made


@pytest.mark.parametrize("place", [0, 1, 2])
def test_finished_blocks_are_not_done_again(
    place: int, deep: Made, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep.calibrated("whole")
    solved.clear()
    interrupt(deep, deep.folder / "out", monkeypatch, place)
    assert solved == list(range(place + 1))
    solved.clear()
    assert deep.job.run("walk", deep.folder / "out")
    assert solved == list(range(place, 4))
    assert not deep.job.run("walk", deep.folder / "out")
    deep.job.finish(deep.folder / "out")
    assert equal(deep.weights(), deep.weights("whole"))
    names = [{path.name for path in (deep.folder / one).iterdir()} for one in ("out", "whole")]
    assert names[0] == names[1]
    assert not any(name.startswith(".") for name in names[0])


def test_lost_hidden_states_are_made_again(deep: Made, solved: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    deep.calibrated("whole")
    out = deep.folder / "out"
    interrupt(deep, out, monkeypatch, 2)
    (lost, *_) = (out / ".states" / "2").glob("*.json")
    lost.unlink()
    solved.clear()
    deep.calibrated()
    assert solved == [0, 1, 2, 3]
    assert equal(deep.weights(), deep.weights("whole"))


def test_what_reads_back_differently_is_made_again(deep: Made, solved: list[int]) -> None:
    deep.calibrated("whole")
    out = deep.folder / "out"
    deep.job.run("walk", out)
    info = open_checkpoint(out).tensors["model.layers.2.mlp.up_proj.weight"]
    with (out / info.file).open("r+b") as file:
        file.seek(-40_000, 2)
        file.write(b"damage")
    with pytest.raises(OSError, match="read back differently"):
        deep.job.finish(out)
    solved.clear()
    deep.calibrated()
    assert solved == [0, 1, 2, 3]
    assert equal(deep.weights(), deep.weights("whole"))


# What is refused ----------------------------------------------------------------------------------------------------


def test_weights_that_overflow(save: Save, tmp_path: Path) -> None:
    def make(seed: int) -> PreTrainedModel:
        network = perturbed(make_llama(), seed)
        with torch.no_grad():
            network.model.layers[1].mlp.up_proj.weight.mul_(1e8)
            network.model.layers[1].mlp.down_proj.weight.div_(1e8)
        return network

    experts = {name: save(make(seed), name, tmp_path) for seed, name in enumerate(("math", "code"), 1)}
    base = save(make_llama(), "base", tmp_path)
    made = Made(tmp_path, base, experts, COMPLETION, COMPLETIONS, out_dtype="float16", weight=1e-3)
    with pytest.raises(InputError, match=r"merges\.ta\.calibrate: tensor .*1\.mlp\.up_proj\.weight has NaN"):
        made.calibrated(dtype="float32")


def test_settings_reach_the_solution(made: Made) -> None:
    made.calibrated()
    for number, settings in enumerate(({"ridge": 5.0}, {"rho": 1.0}, {"alpha": 1.0})):
        made.calibrated(str(number), settings=FeatureCalibration(**settings))
        assert not equal(made.weights(), made.weights(str(number)))
    made.calibrated("held", settings=FeatureCalibration(ridge=1e9, rho=1.0))
    for name, value in made.weights("merged").items():
        torch.testing.assert_close(made.weights("held")[name], value, rtol=1e-6, atol=1e-7)
