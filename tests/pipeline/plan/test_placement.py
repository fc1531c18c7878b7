"""Which placement is chosen, and what the plan says of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.filesize import decimal
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, MixtralForCausalLM

from sensmerge.pipeline.plan import network_layout, placement
from sensmerge.pipeline.plan.memory import Memory, totals_of
from sensmerge.pipeline.plan.placement import PlacementChoice, choose
from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.stage import Stage
from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint
from sensmerge.tasks.checkpoints.header import TensorInfo
from sensmerge.tasks.coefficients import alpha
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.completion import CompletionTask
from sensmerge.tasks.networks.base import Base, open_base
from sensmerge.tasks.networks.networks import skeleton
from sensmerge.tasks.networks.placement import Actors, shares
from sensmerge.tasks.networks.watching import Statistics
from sensmerge.tasks.rows.source import DataSource
from sensmerge.tasks.rows.tables import load_rows
from sensmerge.tasks.statistics.fisher import Fisher
from sensmerge.tasks.statistics.gram import Gram
from sensmerge.tasks.statistics.sensitivity import Sensitivity
from tests.conftest import command_line, llama_config, make_gpt2, measure_sensitivity, plan_of, write_recipe

Recipe = dict[str, Any]
Save = Callable[..., Path]
PLACES = ("whole", "streamed", "{actors: 2}")
GIB = 2**30
SENSITIVITY: Statistics = {"sensitivity": Sensitivity()}
GRAM: Statistics = {"gram": Gram()}
FISHER: Statistics = {"fisher": Fisher()}


def test_auto_goes_by_the_memory_of_a_worker(
    llama_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    base = plan_of(tmp_path, llama_recipe).inputs.base
    needed = Memory(base, torch.float32, 6, SENSITIVITY).whole()
    cases = ((8 * needed, 4, "whole"), (8 * needed - 4, 4, "streamed"), (2 * needed, 1, "whole"))
    for memory, at_once, expected in cases:
        monkeypatch.setattr(placement, "machine_memory", lambda memory=memory: memory)
        settings = [f"resources.statistics.max_in_flight={at_once}"]
        recipe = load_recipe(write_recipe(tmp_path, llama_recipe), settings)
        found = choose(recipe, "statistics", base, 6, decimal)
        assert found.placement == expected
        assert f"{at_once} at once" in found.why


def test_hidden_states_on_disk_are_planned_for(llama_recipe: Recipe, tmp_path: Path) -> None:
    kept = [plan_of(tmp_path, llama_recipe, f"placement={one}").step("statistics", "math").writes for one in PLACES]
    assert [one > 0 for one in kept] == [False, True, False]


def test_a_whole_network_with_its_activations(llamas: dict[str, Path]) -> None:
    base = open_base(llamas["base"])
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(llamas["base"]).parameters())
    blocks = 2 * (2 * 64 + 2 * 48 + 3 * 80)  # q and o, k and v, the three of the MLP; rows + columns
    expected = 4 * (weights + 259 * 32 + 10 * blocks) + 3 * 10 * 259 * 4
    assert Memory(base, torch.float32, 10, SENSITIVITY).whole() == expected
    assert Memory(base, torch.bfloat16, 10, {}).whole() == 2 * (weights + 10 * 80) + 3 * 10 * 259 * 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The config and headers of a Llama of 70 billion parameters, without the weights."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = {name: tuple(one.shape) for name, one in skeleton(config, None, folder).named_parameters()}
    return open_base(folder, Checkpoint(folder, {k: TensorInfo("BF16", shape, "none") for k, shape in shapes.items()}))


def test_what_a_network_of_70_billion_parameters_takes(large: Base) -> None:
    """Worked out by hand: a block has 2 · 8192² + 2 · 1024 · 8192 + 3 · 28672 · 8192 + 2 · 8192 parameters."""
    block, embedding = 855_654_400, 1_050_673_152
    shell = 2 * embedding + 8192
    matrices = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)  # rows + columns of those of a block
    logits = 3 * 1536 * 128256 * 4
    memory = Memory(large, torch.float32, 1536, SENSITIVITY)
    assert memory.whole() == 4 * (shell + 80 * block + embedding + 80 * 1536 * matrices) + logits
    assert memory.streamed() == 4 * (shell + 2 * block + embedding + 1536 * matrices) + logits
    assert 22e9 < memory.streamed() < 24e9
    # Of three actors, the first has the shell and 25 blocks, the others have 28 and 27.
    assert shares(shell, [block] * 80, 3) == [slice(0, 25), slice(25, 53), slice(53, 80)]
    assert memory.actor(3) == 4 * (28 * block + embedding + 28 * 1536 * matrices) + logits
    assert memory.heads(4) == 4 * embedding * 4 + 2 * 256 * 128256 * 4
    forward = Memory(large, torch.bfloat16, 1536, {})
    assert forward.streamed() == 2 * (shell + 2 * block + 1536 * (8192 + 28672)) + logits


def test_what_totals_of_70_billion_parameters_take(large: Base) -> None:
    """Of a linear layer gram holds half of a matrix and as many bytes of inputs, fisher a number for each element."""
    block, embedding = 855_654_400, 1_050_673_152
    sens = Memory(large, torch.bfloat16, 1536, SENSITIVITY)
    assert Memory(large, torch.bfloat16, 1536, SENSITIVITY | FISHER).streamed() == sens.streamed() + 4 * (
        block + 2 * embedding + 8192
    )
    small, wide = 4 * 8192 * 8193, 4 * 28672 * 28673  # queries, keys, values, output, gate, up; down
    both = Memory(large, torch.bfloat16, 1536, SENSITIVITY | GRAM)
    assert both.streamed() == sens.streamed() + 6 * small + wide + small  # and the head
    assert both.whole() == sens.whole() + 80 * (6 * small + wide) + small
    assert both.actor(80) == sens.actor(80) + small + 6 * small + wide
    alone, forward = (Memory(large, torch.bfloat16, 1536, one) for one in (GRAM, {}))
    assert alone.streamed() == forward.streamed() - 2 * block + 7 * small + wide  # one block and not two


def test_a_transposed_weight_has_its_inputs_first(save: Save, tmp_path: Path) -> None:
    base = open_base(save(make_gpt2(), "base", tmp_path))
    found = totals_of(base, GRAM, lambda _, shape: shape[-1])
    assert found == {"transformer.h.0": 3 * 32 + 128, "transformer.h.1": 3 * 32 + 128, None: 32}


def test_every_expert_of_a_mixture_counts(save: Save, tmp_path: Path) -> None:
    settings = llama_config(num_hidden_layers=1).to_dict() | {"num_local_experts": 3, "model_type": "mixtral"}
    base = open_base(save(MixtralForCausalLM(MixtralConfig(**settings)), "base", tmp_path))
    found = totals_of(base, GRAM, lambda _, shape: shape[-1])
    assert found == {"model.layers.0": 4 * 32 + 32 + 3 * (32 + 48), None: 32}  # attention, router, experts; head


def test_totals_are_planned_for(llama_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_layout, "wanted_statistics", lambda _: SENSITIVITY | GRAM)
    plan = plan_of(tmp_path, llama_recipe, "placement=whole")
    half = 2 * (2 * (6 * 32 * 33 + 48 * 49) + 32 * 33)  # two blocks, and the head
    assert plan.step("statistics", "math").writes == half


def test_a_large_network_must_fit(
    large: Base, llama_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(memory: int, cpus: int, *settings: str, stage: Stage = "statistics") -> PlacementChoice:
        monkeypatch.setattr("os.cpu_count", lambda: cpus)
        monkeypatch.setattr(placement, "machine_memory", lambda: memory)
        recipe = load_recipe(write_recipe(tmp_path, llama_recipe), settings)
        return choose(recipe, stage, large, 1536, decimal)

    one = chosen(24 * GIB, 1)
    assert one.placement == "streamed"
    assert "block by block 22.8 GB" in one.why
    with pytest.raises(InputError, match=r"placement: auto: .* more than the 12.9 GB .*\.max_in_flight: 1, set "):
        chosen(24 * GIB, 2)
    assert chosen(24 * GIB, 2, "resources.statistics.max_in_flight=1").placement == "streamed"
    with pytest.raises(InputError, match=r"more than the 17.2 GB .*; set placement: {actors: N} on several"):
        chosen(16 * GIB, 1)
    assert "22.8 GB of memory" in chosen(16 * GIB, 1, "placement=streamed").why  # asked for: said, not refused
    with pytest.raises(InputError, match=r"placement\.actors is 3; the largest takes .*; set it to 9, or fewer"):
        chosen(48 * GIB, 1, "placement={actors: 3}")
    assert chosen(48 * GIB, 1, "placement={actors: 9}").placement == Actors(9, 1, 0)
    with pytest.raises(InputError, match=r"80 are not enough either; set placement: streamed"):
        chosen(8 * GIB, 1, "placement={actors: 3}")
    with pytest.raises(InputError, match=r"the heads of 2 experts, .* take 8.7 GB, more than the 8.6 GB of memory"):
        chosen(8 * GIB, 1, stage="cross_task")


def test_plan_says_what_and_why(
    llama_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipe = write_recipe(tmp_path, llama_recipe)

    def said(*more: str) -> str:
        assert command_line("plan", recipe, "--store", tmp_path / "store", *more) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "statistics runs whole (auto: a whole network with the activations of 6 tokens takes" in said()
    assert "cross_task runs streamed (as the recipe says: " in said("--set", "placement=streamed")
    assert "statistics runs {actors: 2} (as the recipe says: " in said("--set", "placement.actors=2")
    del llama_recipe["merges"]["ties-sens"]
    write_recipe(tmp_path, llama_recipe)
    assert " runs " not in said()


def test_actors_have_the_resources_of_the_stage(llama_recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, llama_recipe, "placement={actors: 2}", "resources.cross_task.num_cpus=3")
    assert plan.placements["statistics"].placement == Actors(2, 1, 0)
    assert plan.placements["cross_task"].placement == Actors(2, 3, 0)
    assert {step.actors for step in plan.steps if step.stage in ("statistics", "cross_task")} == {2}
    assert {step.actors for step in plan.steps if step.stage in ("merge", "evaluate")} == {0}


@pytest.mark.parametrize("setting", ["streamed", "whole", "{actors: 2}"])
def test_no_result_depends_on_the_placement(setting: str, llama_recipe: Recipe, tmp_path: Path) -> None:
    before, after = plan_of(tmp_path, llama_recipe), plan_of(tmp_path, llama_recipe, f"placement={setting}")
    assert [step.key.fingerprint for step in before.steps] == [step.key.fingerprint for step in after.steps]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("disk", r"placement: expected auto, whole, streamed or {actors: N}, N at least 1 \(found 'disk'\)"),
        ("{actor: 2}", r"placement: expected .* N at least 1 \(found {'actor': 2}\)"),
        ("{actors: 0}", r"placement: expected .* N at least 1 \(found {'actors': 0}\)"),
        ("{actors: 3}", r"placement\.actors is 3; the base has 2 blocks, .* set it to 2 at most"),
    ],
)
def test_bad_placements(setting: str, message: str, llama_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plan_of(tmp_path, llama_recipe, f"placement={setting}")


def sens_only(recipe: Recipe) -> Recipe:
    """Leave out what does not need a placement."""
    del recipe["merges"]["ta"]
    for task in recipe["tasks"].values():
        del task["evaluation"]
    return recipe


@pytest.mark.ray
def test_a_run_with_actors(llama_recipe: Recipe, llamas: dict[str, Path], tmp_path: Path, ray_address: str) -> None:
    """Every step with actors takes all CPUs of the cluster, and several are ready at once: none waits for ever."""
    recipe = write_recipe(tmp_path, sens_only(llama_recipe))
    arguments = ("--store", tmp_path / "store", "--address", ray_address, "--report", tmp_path / "report.json")
    assert command_line("run", recipe, *arguments, "--set", "placement={actors: 2}") == 0
    report = read_json(tmp_path / "report.json")
    source = DataSource(path="json", data_files="math.jsonl", samples=3)
    rows = load_rows(source, "tasks.math.calibration", tmp_path).rows
    task = CompletionTask(kind="completion")
    base = llamas["base"]
    (tmp_path / "whole").mkdir()
    whole = alpha(measure_sensitivity(base, llamas["math"], task, rows, tmp_path / "whole"))
    assert report["alpha"]["math"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.ray
def test_more_actors_than_the_cluster_has_room_for(
    llama_recipe: Recipe, tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, sens_only(llama_recipe))
    more = ("--set", "placement={actors: 2}", "--set", "resources.cross_task.num_cpus=2")
    assert command_line("run", recipe, "--store", tmp_path / "store", "--address", ray_address, *more) == 2
    expected = "placement.actors is 2; the cluster has room for 1 with 2 CPUs and 0 GPUs each (resources.cross_task)"
    assert expected in capsys.readouterr().err
    other = ("--set", "resources.cross_task.accelerator_type=H100")
    assert command_line("run", recipe, "--store", tmp_path / "store", "--address", ray_address, *other) == 2
    expected = "resources.cross_task: a step asks for 1 CPUs, 0 GPUs and 0.001 accelerator_type:H100, the largest node"
    assert expected in capsys.readouterr().err
