"""T5 and BART whole, block by block and on actors: the same statistics and distances."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel, T5Config, T5ForConditionalGeneration

from sensmerge.tasks.artifacts import read_json
from sensmerge.tasks.kinds.seq2seq import Seq2SeqTask
from sensmerge.tasks.networks.blocks import blocks_of
from sensmerge.tasks.networks.placement import Actors, Placement
from sensmerge.tasks.rows.source import Row
from sensmerge.tasks.statistics.statistic import TENSORS, read_layers, read_tensor
from tests.conftest import TaskRows, calibration_set, cross_task_job, do_job, make_tokenizer, perturbed, statistics_job
from tests.tasks.networks.owners import owners_here as owners_here

ROWS: list[Row] = [{"source": one, "target": other} for one, other in (("1+2=", "three"), ("a longer source", "x"))]
TASK = Seq2SeqTask(kind="seq2seq")
TOKENS = {"eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 2}
STATISTICS = ("sensitivity", "fisher", "gram")
TOLERANCE = 1e-5


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 4, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=259, **sizes, **TOKENS))


def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"layers": 3, "attention_heads": 4, "ffn_dim": 48}
    both = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=259, d_model=32, max_position_embeddings=64, bos_token_id=0, **both, **TOKENS)
    )


@pytest.mark.parametrize(("make", "apart"), [(t5, [1, 2, 3]), (bart, [0, 1, 2])])
def test_the_blocks_are_the_decoders(make: Callable[[], PreTrainedModel], apart: list[int]) -> None:
    """T5's first one makes what is learned of relative positions for all others."""
    names = list(blocks_of(make()))
    assert all("decoder." in name for name in names)
    assert [int(name.rpartition(".")[2]) for name in names] == apart


def measured(base: Path, expert: Path, placement: Placement, out: Path) -> dict[str, torch.Tensor]:
    """All statistics of an expert by name and layer or tensor."""
    out.mkdir()
    job = statistics_job(base, expert, calibration_set(TASK, ROWS, out.parent), STATISTICS, placement=placement)
    job.finish(out)
    found = {f"sensitivity {one}": torch.tensor(value) for one, value in read_layers(out, "sensitivity").items()}
    for name in ("fisher", "gram"):
        for tensor in read_json(out / f"{name}.json")[TENSORS]:
            total = read_tensor(out, name, tensor)
            if total is not None:
                found[f"{name} {tensor}"] = total
    return found


@pytest.mark.parametrize("make", [t5, bart])
def test_streamed_is_whole(make: Callable[[], PreTrainedModel], save: Callable[..., Path], tmp_path: Path) -> None:
    assert_the_same(make, "streamed", save, tmp_path)


@pytest.mark.parametrize("make", [t5, bart])
def test_shared_out_is_whole(
    make: Callable[[], PreTrainedModel], save: Callable[..., Path], tmp_path: Path, owners_here: None
) -> None:
    assert_the_same(make, Actors(2, 1, 0), save, tmp_path)


def assert_the_same(
    make: Callable[[], PreTrainedModel], other: Placement, save: Callable[..., Path], tmp_path: Path
) -> None:
    """Measure a whole network, and one placed otherwise."""
    base = save(make(), "base", tmp_path)
    experts = {name: save(perturbed(make(), seed), name, tmp_path) for seed, name in enumerate(("math", "code"), 1)}
    placements: dict[str, Placement] = {"whole": "whole", "other": other}
    statistics, distances = {}, {}
    for name, placement in placements.items():
        statistics[name] = measured(base, experts["math"], placement, tmp_path / f"statistics-{name}")
        out = tmp_path / f"distances-{name}"
        sets = {expert: TaskRows(TASK, ROWS) for expert in experts}
        do_job(cross_task_job(base, experts, sets, placement=placement), out)
        distances[name] = read_json(out / "distances.json")
    whole, found = statistics["whole"], statistics["other"]
    assert {key.partition(" ")[0] for key in whole} == set(STATISTICS)
    assert any(key.startswith("gram") and "encoder" in key for key in whole)
    # Some are zero but for their rounding: those of keys' biases, which no softmax sees.
    scales = {one: max(float(v.abs().max()) for k, v in whole.items() if k.startswith(one)) for one in STATISTICS}
    assert found.keys() == whole.keys()
    for key, expected in whole.items():
        scale = scales[key.partition(" ")[0]]
        torch.testing.assert_close(found[key], expected, rtol=TOLERANCE, atol=TOLERANCE * scale)
    for one, row in distances["whole"].items():
        assert distances["other"][one] == pytest.approx(row, rel=TOLERANCE)


@pytest.mark.parametrize("make", [t5, bart])
def test_distances_are_means_over_the_targets_tokens(
    make: Callable[[], PreTrainedModel], save: Callable[..., Path], tmp_path: Path
) -> None:
    networks = {name: perturbed(make(), seed).eval() for seed, name in enumerate(("math", "code"), 1)}
    base = save(make(), "base", tmp_path)
    experts = {name: save(network, name, tmp_path) for name, network in networks.items()}
    sets = {name: TaskRows(TASK, ROWS) for name in experts}
    do_job(cross_task_job(base, experts, sets), tmp_path / "out")
    norms = []
    for row in ROWS:
        batch = TASK.calibration_batch(row, make_tokenizer(), "row")
        with torch.no_grad():
            math, code = (network(**batch).logits[0].double() for network in networks.values())
        assert len(math) == batch["labels"].shape[1]
        norms.append(float((math - code).norm(dim=-1).mean()))
    found = read_json(tmp_path / "out" / "distances.json")
    assert found["math"]["code"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
