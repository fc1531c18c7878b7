"""The same α and g whether a network runs whole, block by block, or with its blocks on actors."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
import ray
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.coefficients import alpha
from sensmerge.tasks.kinds.classification import ClassificationTask
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.networks.sharded import _Lane, shares
from tests.conftest import (
    TaskRows,
    cross_task_job,
    do_job,
    gpt2_config,
    llama_config,
    make_adapter,
    measure_sensitivity,
    perturbed,
)
from tests.tasks.networks.owners import owners_here as owners_here

Save = Callable[..., Path]
ROWS = [{"text": text} for text in ("1+2=3", "a rather longer text than the first", "x")]
LAYERS = 5


def small(config: type, tied: bool, **more: object) -> Any:
    """Five blocks, hidden size 32, vocabulary of the `tokenizer` fixture."""
    settings = llama_config(num_hidden_layers=LAYERS, tie_word_embeddings=tied).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "pad_token_id")
    return config(**{name: settings[name] for name in names}, **more)


def networks(tied: bool) -> dict[str, Callable[[], PreTrainedModel]]:
    def gpt2() -> GPT2LMHeadModel:
        config = gpt2_config()
        config.n_layer, config.tie_word_embeddings = LAYERS, tied
        return GPT2LMHeadModel(config)

    sliding = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}
    return {
        "llama": lambda: LlamaForCausalLM(llama_config(num_hidden_layers=LAYERS, tie_word_embeddings=tied)),
        "qwen2": lambda: Qwen2ForCausalLM(small(Qwen2Config, tied, **sliding)),
        "mistral": lambda: MistralForCausalLM(small(MistralConfig, tied, sliding_window=4)),
        "gemma": lambda: GemmaForCausalLM(small(GemmaConfig, tied, head_dim=8)),
        "gpt2": gpt2,
        # Holds what checkpoints have apart stacked.
        "mixtral": lambda: MixtralForCausalLM(small(MixtralConfig, tied, num_local_experts=3, num_experts_per_tok=2)),
        # Takes its blocks' outputs as tuples.
        "bloom": lambda: BloomForCausalLM(
            BloomConfig(vocab_size=259, hidden_size=32, n_layer=LAYERS, n_head=4, tie_word_embeddings=tied)
        ),
    }


def seeded(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    torch.manual_seed(0)
    network = make()
    return perturbed(network, seed) if seed else network


def completions(names: list[str]) -> dict[str, TaskRows]:
    task = CompletionTask(kind="completion", prompt="{text}", completion="!", loss_on="all")
    return {name: TaskRows(task, ROWS[: 2 + i]) for i, name in enumerate(names)}


def classes(names: list[str]) -> dict[str, TaskRows]:
    rows = [{**row, "label": i % 2} for i, row in enumerate(ROWS)]
    return {name: TaskRows(ClassificationTask(kind="classification"), rows[: 2 + i]) for i, name in enumerate(names)}


def sensitivity_of(
    name: str,
    base: Path,
    experts: dict[str, Path],
    sets: dict[str, TaskRows],
    placement: Placement,
    out: Path,
    dtype: str = "float32",
) -> dict[str, float]:
    """Return the sensitivity of an expert's layers, found in some placement."""
    folder, one = out / name, sets[name]
    folder.mkdir(parents=True)
    found = measure_sensitivity(base, experts[name], *one, folder, placement=placement, dtype=dtype)
    assert [path.name for path in folder.iterdir()] == ["sensitivity.json"]
    return found


def distances_of(
    base: Path,
    experts: dict[str, Path],
    sets: dict[str, TaskRows],
    placement: Placement,
    out: Path,
    dtype: str = "float32",
) -> dict[str, dict[str, float]]:
    """Return all cross-task distances, found in some placement."""
    folder = out / "distances"
    do_job(cross_task_job(base, experts, sets, placement=placement, dtype=dtype), folder)
    found: dict[str, dict[str, float]] = read_json(folder / "distances.json")
    return found


def same_sensitivity(found: dict[str, float], expected: dict[str, float]) -> None:
    assert list(found) == list(expected)
    assert alpha(found) == pytest.approx(alpha(expected), rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-5)


def same_distances(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    for name, row in found.items():
        assert row == pytest.approx(expected[name], rel=1e-5)


def same_as_whole(
    base: Path,
    experts: dict[str, Path],
    sets: dict[str, TaskRows],
    placements: dict[str, Placement],
    out: Path,
    dtype: str = "float32",
) -> None:
    """Check that α of each expert and g of all of them are the same in every placement as they are whole."""
    for name in experts:
        whole = sensitivity_of(name, base, experts, sets, "whole", out / "whole", dtype)
        for label, placement in placements.items():
            same_sensitivity(sensitivity_of(name, base, experts, sets, placement, out / label, dtype), whole)
    distances = distances_of(base, experts, sets, "whole", out / "whole", dtype)
    for label, placement in placements.items():
        same_distances(distances_of(base, experts, sets, placement, out / label, dtype), distances)


def language_models(architecture: str, tied: bool, save: Save, folder: Path) -> tuple[Path, dict[str, Path]]:
    make = networks(tied)[architecture]
    base = save(seeded(make, 0), "base", folder)
    return base, {name: save(seeded(make, seed), name, folder) for seed, name in enumerate(("math", "code"), 1)}


ARCHITECTURES = ["llama", "qwen2", "mistral", "gemma", "gpt2", "bloom", "mixtral"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_language_models(architecture: str, tied: bool, save: Save, tmp_path: Path) -> None:
    base, experts = language_models(architecture, tied, save, tmp_path)
    sets = completions(list(experts))
    same_as_whole(base, experts, sets, {"streamed": "streamed"}, tmp_path)


def test_streamed_classifiers(berts: dict[str, Path], tmp_path: Path) -> None:
    experts = {name: berts[name] for name in ("mood", "topic")}
    sets = classes(list(experts))
    same_as_whole(berts["base"], experts, sets, {"streamed": "streamed"}, tmp_path)


def test_streamed_adapters_in_bfloat16(save: Save, tmp_path: Path) -> None:
    make = networks(True)["llama"]
    base = save(seeded(make, 0), "base", tmp_path)
    experts = {
        name: make_adapter(seeded(make, 0), tmp_path / name, seed, task_type="CAUSAL_LM", target_modules="all-linear")
        for seed, name in enumerate(("math", "code"), 1)
    }
    sets = completions(list(experts))
    same_as_whole(base, experts, sets, {"streamed": "streamed"}, tmp_path, "bfloat16")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_out(architecture: str, tied: bool, save: Save, tmp_path: Path, owners_here: None) -> None:
    base, experts = language_models(architecture, tied, save, tmp_path)
    actors: dict[str, Placement] = {f"{count}": Actors(count, 1, 0) for count in (2, 4)}
    same_as_whole(base, experts, completions(list(experts)), actors, tmp_path)


def test_classifiers_shared_out(berts: dict[str, Path], tmp_path: Path, owners_here: None) -> None:
    experts = {name: berts[name] for name in ("mood", "topic")}
    same_as_whole(berts["base"], experts, classes(list(experts)), {"2": Actors(2, 1, 0)}, tmp_path)


# Every network starts its actors anew, which takes seconds: these few show that they do what `OwnersHere` does.


@pytest.mark.ray
def test_sharded_language_models(save: Save, tmp_path: Path, ray_here: None) -> None:
    base, experts = language_models("llama", True, save, tmp_path)
    sets = completions(list(experts))
    two = Actors(2, 0.5, 0)
    whole = sensitivity_of("math", base, experts, sets, "whole", tmp_path / "whole")
    same_sensitivity(sensitivity_of("math", base, experts, sets, two, tmp_path / "2"), whole)
    distances = distances_of(base, experts, sets, "whole", tmp_path / "whole")
    same_distances(distances_of(base, experts, sets, two, tmp_path / "2"), distances)


@pytest.mark.ray
def test_sharded_classifiers(berts: dict[str, Path], tmp_path: Path, ray_here: None) -> None:
    experts = {name: berts[name] for name in ("mood", "topic")}
    sets = classes(list(experts))
    whole = sensitivity_of("topic", berts["base"], experts, sets, "whole", tmp_path / "whole")
    actors = Actors(2, 0.5, 0)
    same_sensitivity(sensitivity_of("topic", berts["base"], experts, sets, actors, tmp_path / "2"), whole)


def own_actors() -> list[psutil.Process]:
    """Return the processes of the actors of this test's cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()).startswith("ray::BlockOwner"):
                found.append(process)
    return found


@pytest.mark.ray
def test_a_killed_actor_loses_only_what_it_was_at_work_on(
    save: Save, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = language_models("llama", False, save, tmp_path)
    task = completions(["math"])["math"].task
    done: list[tuple[int, int, str]] = []
    lost: list[tuple[int, int, str]] = []
    receive = _Lane.receive

    def watched(lane: _Lane) -> tuple[int, Any] | None:
        if len(done) == 12:
            actors = own_actors()
            assert len(actors) == 2
            actors[0].kill()
        piece = next(iter(lane.sent.values()))
        answer = receive(lane)
        (lost if answer is None else done).append((piece.number, piece.work.place, piece.work.method))
        return answer

    found: dict[str, Any] = {}
    for name, placement in (("whole", "whole"), ("killed", Actors(2, 0.5, 0))):
        monkeypatch.setattr(_Lane, "receive", watched)
        (tmp_path / name).mkdir()
        found[name] = measure_sensitivity(base, experts["math"], task, ROWS * 3, tmp_path / name, placement=placement)
    assert found["killed"] == pytest.approx(found["whole"], rel=1e-5)
    assert len(lost) == 1
    assert len(done) == len(set(done)) == len(ROWS * 3) * (3 + 2 * 2)


@pytest.mark.ray
def test_work_that_kills_every_actor_is_named(save: Save, tmp_path: Path, ray_here: None) -> None:
    base, experts = language_models("llama", False, save, tmp_path)
    task = completions(["math"])["math"].task
    finished = Event()

    def kill_all() -> None:
        while not finished.wait(0.05):
            for process in own_actors():
                process.kill()

    killer = Thread(target=kill_all)
    killer.start()
    try:
        message = r"experts\.math: enter of the shell on sample 0: its actor died 2 times; if it ran out"
        with pytest.raises(RuntimeError, match=message):
            measure_sensitivity(base, experts["math"], task, ROWS, tmp_path, placement=Actors(2, 0.5, 0))
    finally:
        finished.set()
        killer.join()


@pytest.mark.parametrize(
    ("shell", "blocks", "count", "expected"),
    [
        (0, [1] * 6, 2, [3, 3]),
        (0, [1] * 5, 4, [1, 1, 2, 1]),
        (3, [1] * 22, 2, [9, 13]),
        (100, [1] * 4, 3, [1, 1, 2]),
        (1, [5], 1, [1]),
        (0, [1, 1, 1, 9], 2, [3, 1]),
    ],
)
def test_shares(shell: int, blocks: list[int], count: int, expected: list[int]) -> None:
    found = shares(shell, blocks, count)
    assert found[0].start == 0
    assert found[-1].stop == len(blocks)
    assert [one.stop - one.start for one in found] == expected
    assert all(one.stop == other.start for one, other in pairwise(found))


@pytest.mark.ray
def test_a_killed_step_takes_its_actors_place_again(save: Save, tmp_path: Path, ray_here: None) -> None:
    """Its placement group outlives the process that made it: the next try must not wait for it for ever."""
    base, experts = language_models("llama", False, save, tmp_path)
    task = completions(["math"])["math"].task

    @ray.remote(num_cpus=0, max_retries=1)
    def step() -> None:
        first = not (tmp_path / "tried").exists()
        (tmp_path / "tried").touch()

        def killed(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if first:
            _Lane.receive = killed  # type: ignore[method-assign, assignment]
        # All CPUs of the cluster.
        measure_sensitivity(base, experts["math"], task, ROWS, tmp_path, placement=Actors(2, 1, 0))

    ray.get(step.remote(), timeout=300)
    assert len(read_json(tmp_path / "sensitivity.json")["sensitivity"]) == LAYERS + 3
