"""Fine-tunes as adapters: against singular values of numpy, in peft, and in our own reader."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.adapter_files import write_adapter
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.expert import Expert, open_expert
from sensmerge.tasks.networks.extraction import Extracted, extract
from tests.conftest import make_bert_expert, make_bert_trunk, make_gpt2, make_llama, perturbed

FULL = 1000
"""a rank that is no limit"""


def opened(base: Path, expert: Path) -> Expert:
    return open_expert(expert, open_base(base), "expert")


def logits(network: PreTrainedModel | PeftModel) -> torch.Tensor:
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        found: torch.Tensor = network.eval()(input_ids=ids).logits
    return found


def in_peft(found: Extracted, base: PreTrainedModel, folder: Path) -> PeftModel:
    folder.mkdir()
    write_adapter(folder, found.tensors, found.config)
    return PeftModel.from_pretrained(base, folder)


@pytest.fixture(scope="module")
def llama(save: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with an own head, and a fine-tune."""
    folder, untied = tmp_path_factory.mktemp("llama"), {"tie_word_embeddings": False}
    tuned = perturbed(make_llama(**untied), 1)
    return {"base": save(make_llama(**untied), "base", folder), "tuned": save(tuned, "tuned", folder)}


@pytest.mark.parametrize("tie", [False, True])
def test_of_full_rank_it_is_the_fine_tune(tie: bool, save: Callable[..., Path], tmp_path: Path) -> None:
    base = save(make_llama(tie_word_embeddings=tie), "base", tmp_path)
    tuned = save(perturbed(make_llama(tie_word_embeddings=tie), 1), "tuned", tmp_path)
    found = extract(opened(base, tuned), FULL, (str(base), None), whole=True)
    assert found.error < 1e-6
    network = in_peft(found, AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(network), logits(AutoModelForCausalLM.from_pretrained(tuned)))
    again, expert = opened(base, tmp_path / "adapter"), opened(base, tuned)
    for name in expert.base.weights:
        torch.testing.assert_close(again.delta(name), expert.delta(name), rtol=0, atol=1e-6)


def test_errors_are_those_of_the_singular_values_left_out(llama: dict[str, Path]) -> None:
    said: list[str] = []
    expert = opened(llama["base"], llama["tuned"])
    found = extract(expert, 3, ("base", None), advance=lambda name, part: said.append(name))
    deltas = {name: expert.delta(name).double().numpy() for name in expert.base.weights}
    assert said == list(found.parts) == list(expert.base.weights)
    squares = 0.0
    for name, part in found.parts.items():
        assert part.norm == pytest.approx(np.linalg.norm(deltas[name]), rel=1e-9)
        linear = "proj" in name or "lm_head" in name
        assert (part.rank, bool(part.why)) == ((3, False) if linear else (0, True))
        left = np.linalg.svd(deltas[name], compute_uv=False)[3:] if linear else deltas[name]
        assert part.error == pytest.approx(np.linalg.norm(left), rel=1e-5)
        squares += part.error**2
    whole = math.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in deltas.values()))
    assert found.error == pytest.approx(math.sqrt(squares) / whole)
    assert sum(map(found.share, found.parts.values())) == pytest.approx(1)


def test_the_adapter_in_peft_is_the_base_and_its_factors(llama: dict[str, Path], tmp_path: Path) -> None:
    expert = opened(llama["base"], llama["tuned"])
    found = extract(expert, 0.6, ("base", None))
    ranks = {part.rank for part in found.parts.values() if part.rank}
    assert len(ranks) > 1, "shares need different ranks"
    network = in_peft(found, AutoModelForCausalLM.from_pretrained(llama["base"]), tmp_path / "adapter")
    merged = network.merge_and_unload().state_dict()
    again = opened(llama["base"], tmp_path / "adapter")
    for name in expert.base.weights:
        torch.testing.assert_close(merged[name], expert.base.read(name) + again.delta(name), rtol=0, atol=1e-6)
        if found.parts[name].rank:
            rest = float(torch.linalg.matrix_norm(expert.delta(name) - again.delta(name)))
            assert rest**2 <= 0.4 * found.parts[name].norm ** 2 * (1 + 1e-5)


def test_weights_that_are_stored_transposed(save: Callable[..., Path], tmp_path: Path) -> None:
    base, tuned = save(make_gpt2(), "base", tmp_path), save(perturbed(make_gpt2(), 2), "tuned", tmp_path)
    found = extract(opened(base, tuned), FULL, (str(base), None), whole=True)
    network = in_peft(found, AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = AutoModelForCausalLM.from_pretrained(tuned).state_dict()
    merged = network.merge_and_unload().state_dict()
    left_out = {name for name, part in found.parts.items() if part.error > 1e-5 * part.norm}
    assert {name.rpartition(".")[2] for name in left_out} == {"bias"}  # of layers with factors
    for name, value in expected.items():
        if not any(name.endswith(one) for one in left_out):
            torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_a_head_that_the_base_lacks_is_left_out(save: Callable[..., Path], tmp_path: Path) -> None:
    trunk = make_bert_trunk()
    base, tuned = save(trunk, "base", tmp_path), save(make_bert_expert(trunk, 1, 2), "tuned", tmp_path)
    expert = opened(base, tuned)
    found = extract(expert, 2, (str(base), None))
    assert set(expert.head) == {"classifier.weight", "classifier.bias"}
    assert not any("classifier" in name for name in (*found.parts, *found.tensors))


def test_a_classifiers_head_that_the_base_has_is_held(save: Callable[..., Path], tmp_path: Path) -> None:
    trunk = make_bert_trunk()
    base = save(make_bert_expert(trunk, 1, 2), "base", tmp_path)
    tuned = save(perturbed(make_bert_expert(trunk, 1, 2), 5), "tuned", tmp_path)
    found = extract(opened(base, tuned), FULL, (str(base), None), whole=True)
    load = AutoModelForSequenceClassification.from_pretrained
    network = in_peft(found, load(base), tmp_path / "adapter").merge_and_unload().state_dict()
    torch.testing.assert_close(network["classifier.weight"], load(tuned).state_dict()["classifier.weight"])


def test_it_is_the_same_for_any_number_of_threads(llama: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expert = opened(llama["base"], llama["tuned"])
    first = extract(expert, 4, ("base", None), whole=True)
    monkeypatch.setattr("sensmerge.tasks.networks.extraction.AT_ONCE", 1)
    second = extract(expert, 4, ("base", None), whole=True)
    assert first.parts == second.parts
    assert first.config == second.config
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


def test_nothing_to_hold_is_refused(llama: dict[str, Path], save: Callable[..., Path], tmp_path: Path) -> None:
    network = make_llama(tie_word_embeddings=False)
    with torch.no_grad():
        network.model.norm.weight += 1
    norm_only = save(network, "tuned", tmp_path)
    with pytest.raises(InputError, match="changes no weight of a linear layer"):
        extract(opened(llama["base"], norm_only), 4, ("base", None))


def test_numbers_that_are_not_finite_are_refused(
    llama: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    network = make_llama(tie_word_embeddings=False)
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight: .* NaN or Inf"):
        extract(opened(llama["base"], save(network, "tuned", tmp_path)), 4, ("base", None))
