"""Networks that tag words or give numbers: the same α and g whole and block by block."""

from collections.abc import Callable
from pathlib import Path

from sensmerge.tasks.kinds.regression import RegressionTask
from sensmerge.tasks.kinds.token_classification import TokenClassificationTask
from sensmerge.tasks.rows.source import Row
from tests.conftest import TaskRows, make_bert_expert, make_bert_trunk
from tests.taggers import make_tagger, spaced_tokenizer
from tests.tasks.networks.test_streaming import same_as_whole

Save = Callable[..., Path]


def test_streamed_taggers(save: Save, tmp_path: Path) -> None:
    names = {"people": ["O", "B-PER", "I-PER"], "places": ["O", "B-LOC"]}
    trunk = make_bert_trunk()
    base = save(trunk, "base", tmp_path)
    spaced_tokenizer().save_pretrained(base)
    experts = {name: save(make_tagger(trunk, 1, some), name, tmp_path) for name, some in names.items()}
    rows: list[Row] = [{"tokens": ["a", "bc", "d"][:count], "tags": [1, 0, 1][:count]} for count in (3, 1, 2)]
    sets = {name: TaskRows(TokenClassificationTask(kind="token_classification"), rows) for name in names}
    same_as_whole(base, experts, sets, {"streamed": "streamed"}, tmp_path)


def test_streamed_networks_that_give_numbers(save: Save, tmp_path: Path) -> None:
    trunk = make_bert_trunk()
    base = save(trunk, "base", tmp_path)
    experts = {name: save(make_bert_expert(trunk, seed, 1), name, tmp_path) for seed, name in enumerate("ab", 1)}
    rows: list[Row] = [{"text": "a" * count, "label": 1.5 * count} for count in (3, 1, 2)]
    sets = {name: TaskRows(RegressionTask(kind="regression"), rows) for name in experts}
    same_as_whole(base, experts, sets, {"streamed": "streamed"}, tmp_path)
