"""A streamed run without a way back that was interrupted: it goes on, and ends with the same bytes."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sensmerge.tasks.networks.blocks import Part, Shell
from sensmerge.tasks.networks.placement import Placement
from sensmerge.tasks.networks.runners import open_runner
from sensmerge.tasks.networks.source import Source
from sensmerge.tasks.networks.watching import Statistics
from sensmerge.tasks.statistics.fisher import Fisher
from sensmerge.tasks.statistics.gram import Gram
from sensmerge.tasks.statistics.sensitivity import Sensitivity
from tests.conftest import make_llama, perturbed

Save = Callable[..., Path]
SAMPLES = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    for ids in (torch.randint(3, 250, (1, length), generator=torch.manual_seed(0)) for length in (5, 9, 3, 30))
]
BLOCKS = 4
GRAM: Statistics = {"gram": Gram()}


@pytest.fixture
def source(save: Save, tmp_path: Path) -> Source:
    torch.manual_seed(0)
    network = make_llama(num_hidden_layers=BLOCKS)
    base, expert = save(network, "base", tmp_path), save(perturbed(network, 1), "math", tmp_path)
    return Source(base, expert, "experts.math", "causal_lm", torch.float32, "cpu")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks that have been loaded, in order."""
    names: list[str] = []
    load = Source.load

    def watched(self: Source, module: torch.nn.Module, prefix: str, *args: object, **kwargs: bool) -> None:
        names.append(prefix)
        load(self, module, prefix, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Source, "load", watched)
    return names


def run(source: Source, folder: Path, statistics: Statistics = GRAM, placement: Placement = "streamed") -> None:
    folder.mkdir(exist_ok=True)
    with open_runner(source, placement, folder, statistics) as runner:
        assert [number for number, _ in runner.run(SAMPLES, lambda *_: None)] == list(range(len(SAMPLES)))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(monkeypatch: pytest.MonkeyPatch, cls: type, method: str, call: int) -> None:
    """Have a method raise at its nth call, and be itself again."""
    original, calls = getattr(cls, method), []

    def stopping(*args: object) -> object:
        calls.append(args)
        if len(calls) == call:
            monkeypatch.setattr(cls, method, original)
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(cls, method, stopping)


@pytest.mark.parametrize(
    ("cls", "method", "call", "again"),
    [
        (Part, "forward", 2 * len(SAMPLES) + 3, [2, 3]),  # in a block
        (Part, "write", 1, [0, 1, 2, 3]),
        (Part, "write", 3, [2, 3]),  # between states and totals
        (Shell, "end", 2, []),
        (Shell, "write", 1, []),
        (Shell, "enter", 2, [0, 1, 2, 3]),
    ],
)
def test_finished_blocks_are_not_done_again(
    cls: type,
    method: str,
    call: int,
    again: list[int],
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[str],
) -> None:
    run(source, tmp_path / "plain")
    interrupt(monkeypatch, cls, method, call)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "interrupted")
    loaded.clear()
    run(source, tmp_path / "interrupted")
    assert loaded == ["", *(f"model.layers.{place}." for place in again)]
    assert files(tmp_path / "interrupted") == files(tmp_path / "plain")
    assert len(files(tmp_path / "plain")) == BLOCKS + 1


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from sensmerge.tasks.networks.blocks import Part
    from tests.tasks.networks.test_resuming import Source, run, torch

    forward, calls = Part.forward, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*args)

    Part.forward = killed
    base, expert, folder = map(Path, sys.argv[1:])
    run(Source(base, expert, "experts.math", "causal_lm", torch.float32, "cpu"), folder)
"""


def test_a_process_that_is_killed(source: Source, tmp_path: Path, loaded: list[str]) -> None:
    arguments = [str(one) for one in (source.base, source.folder, tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], env=environment, check=False)
    assert found.returncode == -signal.SIGKILL
    run(source, tmp_path / "killed")
    assert loaded == ["", *(f"model.layers.{place}." for place in range(1, BLOCKS))]
    run(source, tmp_path / "plain")
    assert files(tmp_path / "killed") == files(tmp_path / "plain")


@pytest.mark.parametrize(
    ("statistics", "placement"),
    [
        (GRAM, "whole"),
        (GRAM | {"fisher": Fisher()}, "streamed"),
        (GRAM | {"sensitivity": Sensitivity()}, "streamed"),
    ],
)
def test_other_runs_start_anew(
    statistics: Statistics, placement: Placement, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step may be placed elsewhere the next time: nothing of the first try is taken for a part of it."""
    run(source, tmp_path / "plain", statistics, placement)
    interrupt(monkeypatch, Part, "forward", 2 * len(SAMPLES) + 3)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "interrupted")
    assert files(tmp_path / "interrupted")
    run(source, tmp_path / "interrupted", statistics, placement)
    assert files(tmp_path / "interrupted") == files(tmp_path / "plain")


def test_streamed_goes_on_behind_nothing_of_a_whole_try(source: Source, tmp_path: Path) -> None:
    run(source, tmp_path / "out", placement="whole")
    run(source, tmp_path / "out")
    run(source, tmp_path / "plain")
    assert files(tmp_path / "out") == files(tmp_path / "plain")


def test_samples_without_labels(source: Source, tmp_path: Path) -> None:
    run(source, tmp_path / "plain")
    for placement in ("whole", "streamed"):
        folder = tmp_path / placement
        folder.mkdir()
        unlabelled = [{key: one for key, one in sample.items() if key != "labels"} for sample in SAMPLES]
        with open_runner(source, placement, folder, GRAM) as runner:
            assert {one.loss for _, one in runner.run(unlabelled, lambda *_: pytest.fail("no loss"))} == {None}
    assert files(tmp_path / "streamed") == files(tmp_path / "plain")


def test_weights_stay_in_their_files(source: Source) -> None:
    """Those that are computed with as they are stored; the dtype of the others is another one."""
    name, block = next(iter((n, b) for n, b in source.hollow().named_modules() if n == "model.layers.0"))
    source.load(block, f"{name}.", copied=False)
    values = [parameter.detach() for parameter in block.parameters()]
    again = source.expert.read(f"{name}.mlp.up_proj.weight")
    assert again.data_ptr() in {one.data_ptr() for one in values}
