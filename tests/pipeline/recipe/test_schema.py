"""What a recipe may say, and what is said of what it may not."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.pipeline.recipe.load import load_recipe
from sensmerge.pipeline.recipe.schema import Recipe
from sensmerge.pipeline.recipe.variant import Variant
from sensmerge.tasks.dynamic.application import SeApplication
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.methods.contract import METHODS, method_of
from tests.conftest import write_recipe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"

MINIMAL: dict[str, Any] = {
    "name": "r",
    "base": "base",
    "experts": {"math": {"model": "m"}, "code": {"model": "c"}},
    "merges": {"ta": {"method": "task_arithmetic"}},
}
TASK = {"kind": "completion", "calibration": {"path": "json", "data_files": "rows.jsonl"}}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


def test_minimal_recipe_has_mergekit_defaults(tmp_path: Path) -> None:
    variant = load_recipe(write(tmp_path)).merges["ta"]
    assert variant.params() == {
        "method": "task_arithmetic",
        "weight": "1.0",
        "coefficients.kind": "uniform",
        "application.kind": "static",
        "normalize": "False",
        "lambda": "1.0",
    }


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("linear", {"normalize": True}),
        ("task_arithmetic", {"normalize": False, "lambda": 1.0}),
        ("ties", {"density": 1.0, "normalize": True, "rescale": False, "lambda": 1.0}),
        ("dare_linear", {"density": 1.0, "normalize": False, "rescale": True, "lambda": 1.0, "seed": 0}),
        ("dare_ties", {"density": 1.0, "normalize": False, "rescale": True, "lambda": 1.0, "seed": 0}),
    ],
)
def test_settings_of_methods_have_mergekit_defaults(method: str, defaults: dict[str, Any]) -> None:
    assert method_of({"method": method}).model_dump(by_alias=True) == {"method": method, **defaults}


def test_the_schema_has_the_settings_of_all_methods() -> None:
    properties = Recipe.model_json_schema()["$defs"]["Variant"]["properties"]
    assert properties["method"]["enum"] == list(METHODS)
    random = "dare_linear, dare_ties, della, della_linear"
    assert properties["seed"]["description"] == f"seed of the random masks; only for {random}"
    assert properties["seed"]["default"] == 0
    assert "default" not in properties["rescale"]
    assert properties["rescale"]["description"].endswith(
        "default: false for ties, breadcrumbs, breadcrumbs_ties; "
        "default: true for dare_linear, dare_ties, della, della_linear"
    )
    assert properties["t"]["description"] == (
        "where on the arc: 0 is the base, 1 the expert (slerp); how far an element moves from the base's at most "
        "(nearswap)"
    )


def test_reading_methods_needs_no_torch() -> None:
    code = (
        "import sys; from sensmerge.tasks.methods.contract import METHODS; from sensmerge.tasks.methods import table; "
        "table.methods_table(); assert METHODS; print(*{'torch', 'numba', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_reading_a_recipe_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from sensmerge.pipeline.recipe.load import load_recipe; "
        "assert load_recipe(Path(sys.argv[1])).merges; print(*{'torch', 'transformers', 'numba'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, str(CONFIGS / "quickstart" / "recipe.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bass": "x"}, "unknown key bass; did you mean base?"),
        (
            {"merges": {"ta": {"method": "task_arithmetic", "wieght": 1}}},
            "unknown key merges.ta.wieght; did you mean weight?",
        ),
        ({"tasks": {"math": {**TASK, "promt": "x"}}}, "unknown key tasks.math.promt; did you mean prompt?"),
        (
            {"merges": {"x": {"method": "ties", "coefficients": {"kind": "sens", "temp": 1}}}},
            "merges.x.coefficients.temp",
        ),
        ({"experts": {}}, "experts: found 0; expected at least one"),
        ({"experts": {"a": {"model": "m"}, "b": {"model": "m"}}}, "experts a and b are the same model m"),
        (
            {"merges": {"t": {"method": "ties", "density": 1.5}}},
            "merges.t: density is 1.5; expected .* between 0 and 1",
        ),
        ({"merges": {"t": {"method": "ties", "density": -0.1}}}, "density is -0.1"),
        (
            {"merges": {"t": {"method": "ties", "density": {"math": 0.5}}}},
            "merges.t.density: found math; expected every",
        ),
        ({"merges": {"t": {"method": "ties", "weight": 11}}}, "merges.t.weight: .* less than or equal to 10"),
        ({"merges": {"t": {"method": "ties", "weight": float("nan")}}}, "merges.t.weight"),
        ({"merges": {"t": {"method": "tie"}}}, "merges.t.method: .*'task_arithmetic'.*found 'tie'"),
        (
            {"merges": {"t": {"method": "task_arithmetic", "density": 0.5}}},
            "density has no meaning for .* task_arithmetic",
        ),
        ({"merges": {"t": {"method": "ties", "seed": 1}}}, "seed has no meaning for method ties"),
        ({"merges": {"t": {"method": "linear", "lambda": 2}}}, "lambda has no meaning for method linear"),
        ({"merges": {"t": {"method": "linear", "weight": 0}}}, "merges.t: the weights sum to 0"),
        ({"merges": {"math": {"method": "ties"}}}, "the name 'math' is used twice"),
        ({"merges": {"base": {"method": "ties"}}}, "the name 'base' is used twice"),
        ({"merges": {}}, "merges: .* at least 1 item"),
        ({"merges": {"../x": {"method": "ties"}}}, "merges"),
        (
            {"merges": {"s": {"method": "ties", "coefficients": {"kind": "sens"}}}},
            "merges.s: coefficients sens needs tasks.code.calibration; add it",
        ),
        ({"merges": {"ta": {"method": "task_arithmatic"}}}, r"'task_arithmatic'\); did you mean task_arithmetic\?"),
        ({"tasks": {"math": {**TASK, "kind": "complete"}}}, "'multiple_choice', .*; did you mean completion?"),
        ({"resources": {"merg": {}}}, r"'merg'\); did you mean merge\?"),
        ({"zzz": 1}, "unknown key zzz; see"),
        ({"tasks": {"law": TASK}}, r"tasks.law: there is no expert of that name \(experts: code, math\)"),
        ({"base": None}, "base"),
        (
            {"merges": {"e": {"method": "ties", "coefficients": {"kind": "explicit", "weights": {"math": 1}}}}},
            "merges.e.coefficients.weights: found math; expected every expert once: code, math",
        ),
        ({"resources": {"vectors": {"num_gpus": 1}}}, "resources.vectors.num_gpus: the stage uses no GPU"),
        ({"resources": {"merge": {"resources": {"GPU": 1}}}}, "GPU is not one of the other resources; write num_gpus"),
        ({"resources": {"merge": {"resources": {"disk": 0}}}}, "disk is 0; expected more than 0, or leave it out"),
        (
            {"merges": {"t": {"method": "tsv_m"}}, "resources": {"merge": {"num_gpus": 1}}},
            "merges.t: method tsv_m does not give the same bits on a GPU as on a CPU; leave resources.merge.num_gpus "
            r"out, .* \(methods that run on one: linear, task_arithmetic, ties, dare_linear, dare_ties, .*\)",
        ),
        ({"tasks": {"math": {"kind": "completion"}}}, "tasks.math: has neither calibration nor evaluation"),
        ({"merges": {"t": {"method": "ties", "weight": True}}}, "merges.t.weight: .* valid number"),
        ({"merges": {"t": {"method": "ties", "weight": "0.5"}}}, "merges.t.weight: .* valid number"),
        ({"base": ""}, "base: .* at least 1 character"),
        ({"tokenizer": {"tokens": {"<t>": {"source": 3}}}}, r"tokenizer\.tokens\.<t>\.source: Input should be"),
        (
            {"tokenizer": {"tokens": {"str": {"source": {"kind": "model_token", "model": "a", "token": 3}}}}},
            r"tokenizer\.tokens\.str\.source\.token: Input should be a valid string",
        ),
        ({"tokenizer": {"tokens": {"str": "a"}}}, r"tokenizer\.tokens\.str: Input should be"),
        (
            {"tasks": {"math": {"kind": "chat", "messages": [{"role": "user"}]}}},
            r"tasks\.math\.messages\.0\.content is missing",
        ),
        ({"resources": {"merge": {"num_cpu": 1}}}, "unknown key resources.merge.num_cpu; did you mean num_cpus?"),
    ],
)
def test_bad_recipes_are_one_line_that_names_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_missing_key_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: r\n")
    with pytest.raises(InputError, match="base is missing"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "found list"), ("", "found NoneType")]
)
def test_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_same_expert_twice_in_yaml(tmp_path: Path) -> None:
    text = "name: r\nbase: b\nexperts:\n  m: {model: x}\n  m: {model: y}\nmerges: {t: {method: ties}}\n"
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match="key 'm' stands twice"):
        load_recipe(tmp_path / "r.yaml")


def test_override_of_a_variant_with_a_dot_in_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, merges={"ta-0.5": {"method": "task_arithmetic"}}, tasks=None)
    assert load_recipe(path, ["merges.ta-0.5.weight=0.3"]).merges["ta-0.5"].weight == 0.3


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path)
    recipe = load_recipe(path, ["merges.ta.weight=0.25", "dtype=bfloat16", "resources.merge.num_cpus=2"])
    assert (recipe.merges["ta"].weight, recipe.dtype, recipe.resources_of("merge").num_cpus) == (0.25, "bfloat16", 2)
    for override, message in (
        ("merges.ta.wieght=1", "unknown key merges.ta.wieght"),
        ("weight", "expected a.b=value"),
        ("name.x=1", "name holds a single value"),
    ):
        with pytest.raises(InputError, match=message):
            load_recipe(path, [override])


def test_a_null_list_or_number_in_the_way_of_an_override(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--set base=\\[: not valid YAML"):
        load_recipe(write(tmp_path), ["base=["])


def test_every_field_of_the_schema_is_described() -> None:
    def fields(node: Any, path: str = "") -> list[str]:
        if isinstance(node, list):
            return [found for item in node for found in fields(item, path)]
        if not isinstance(node, dict):
            return []
        missing = []
        for name, field in node.get("properties", {}).items():
            # The constant `kind` of a union is described by the class it chooses.
            if "description" not in field and "const" not in field:
                missing.append(f"{path}.{name}")
        return missing + [found for key, item in node.items() for found in fields(item, f"{path}.{key}")]

    schema = Recipe.model_json_schema()
    json.dumps(schema)
    assert fields(schema) == []
    assert "lambda" in schema["$defs"]["Variant"]["properties"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_recipes_of_the_project_are_valid(path: Path) -> None:
    load_recipe(path)


methods = st.sampled_from(["task_arithmetic", "ties", "dare_linear", "dare_ties"])


@given(method=methods, weight=st.floats(-10, 10), normalize=st.booleans(), lambda_=st.floats(-2, 2))
def test_variants_survive_yaml(method: str, weight: float, normalize: bool, lambda_: float) -> None:
    variant = Variant.model_validate({"method": method, "weight": weight, "normalize": normalize, "lambda": lambda_})
    text = yaml.safe_dump(variant.model_dump(by_alias=True, exclude_unset=True))
    assert Variant.model_validate(yaml.safe_load(text)) == variant


def test_params_are_flat(tmp_path: Path) -> None:
    settings = {"method": "ties", "density": {"math": 0.5, "code": 1.0}, "coefficients": {"kind": "sens"}}
    tasks = {"math": TASK, "code": TASK}
    variant = load_recipe(write(tmp_path, merges={"t": settings}, tasks=tasks)).merges["t"]
    params = variant.params()
    assert params["method"] == "ties"
    assert params["density.math"] == "0.5"
    assert params["coefficients.kind"] == "sens"
    assert params["coefficients.direction"] == "distance"


def test_recipe_fixture_is_valid(llama_recipe: dict[str, Any], tmp_path: Path, save: Callable[..., Path]) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(llama_recipe))
    assert load_recipe(tmp_path / "r.yaml").sens_variants() == ["ties-sens"]


# Application se -------------------------------------------------------------------------------------------------------

LABELLED = {**TASK, "kind": "classification"}


def se(folder: Path, tasks: Any = None, /, method: str = "task_arithmetic", **settings: Any) -> Path:
    """A recipe with one SE variant; settings of its application are given as `application`."""
    application = {"kind": "se", **settings.pop("application", {})}
    merges = {"x": {"method": method, **settings, "application": application}}
    return write(folder, merges=merges, tasks={"math": TASK, "code": TASK} if tasks is None else tasks)


def test_se_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(se(tmp_path))
    assert recipe.se_variants() == ["x"]
    application = recipe.merges["x"].application
    assert isinstance(application, SeApplication)
    assert (application.score, application.layer, application.pool) == ("auto", "auto", "auto")
    assert application.mass is None
    assert recipe.merges["x"].params()["application.score"] == "auto"


@pytest.mark.parametrize("application", [{}, {"application": {"kind": "static"}}])
def test_static_is_the_default_and_can_be_said(application: dict[str, Any], tmp_path: Path) -> None:
    merges = {"ta": {"method": "task_arithmetic", **application}}
    recipe = load_recipe(write(tmp_path, merges=merges))
    assert recipe.se_variants() == []
    assert recipe.merges["ta"].params()["application.kind"] == "static"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ties", "density": 0.3, "coefficients": {"kind": "sens"}},
        {"method": "ties", "weight": -1.0},  # the weights' common factor cancels
        {"method": "linear"},
        {"method": "dare_ties", "weight": 0.3, "seed": 3},
        {"application": {"score": "nearest", "layer": 3, "pool": "cls", "metric": "cosine", "mass": 2, "fallback": 0}},
    ],
)
def test_se_goes_with_every_method_and_coefficients(settings: dict[str, Any], tmp_path: Path) -> None:
    assert load_recipe(se(tmp_path, **settings)).se_variants() == ["x"]


@pytest.mark.parametrize(
    ("settings", "origin", "last_static_stage"),
    [
        ({}, "base", "merge"),
        ({"method": "ties"}, "base", "merge"),
        ({"application": {"origin": "static"}}, "static", "merge"),
        ({"method": "tsv_m"}, "static", "merge"),
        ({"calibrate": {}}, "static", "calibrate"),
        ({"weight": "auto"}, "static", "merge"),
    ],
)
def test_task_vectors_start_from_the_base_where_they_merge_by_themselves(
    settings: dict[str, Any], origin: str, last_static_stage: str, tmp_path: Path
) -> None:
    variant = load_recipe(se(tmp_path, **settings)).merges["x"]
    assert (variant.origin, variant.last_static_stage, variant.last_stage) == (origin, last_static_stage, "route")
    assert load_recipe(write(tmp_path)).merges["ta"].origin is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "tsv_m", "application": {"origin": "base"}},
            "merges.x: method tsv_m has no application se from the base: .*; set application.origin: static",
        ),
        ({"calibrate": {}, "application": {"origin": "base"}}, "merges.x: calibrate changes the static merge"),
        ({"method": "tsv_m", "application": {"score": "alignment"}}, "merges.x: score alignment looks at the way"),
        ({"out_dtype": "float16"}, "merges.x: out_dtype has no meaning for application se"),
        ({"shard_size": 1000}, "merges.x: shard_size has no meaning for application se"),
        ({"method": "linear", "normalize": False}, "merges.x: linear with normalize: false scales the base"),
        ({"weight": 0}, "merges.x: application se needs coefficients to rescale; set weight and lambda above 0"),
        ({"weight": -0.5}, "merges.x: application se needs coefficients to rescale"),
        ({"method": "ties", "weight": 0.0}, "merges.x: application se needs coefficients to rescale"),
        ({"method": "ties", "lambda": 0}, "merges.x: application se needs coefficients to rescale"),
        ({"lambda": -1}, "merges.x: application se needs coefficients to rescale"),
        ({"application": {"temprature": 1}}, "unknown key merges.x.application.temprature; did you mean temperature?"),
        ({"application": {"temperature": 0}}, "merges.x.application.temperature: .*greater than 0"),
        ({"application": {"temperature": float("inf")}}, "merges.x.application.temperature: "),
        ({"application": {"mass": 0}}, "merges.x.application.mass: .*greater than 0"),
        ({"application": {"fallback": 1.5}}, "merges.x.application.fallback: .*less than or equal to 1"),
        ({"application": {"score": "near"}}, "merges.x.application.score: .*'nearest'.*found 'near'"),
        ({"application": {"pool": "max"}}, "merges.x.application.pool: .*'mean'.*found 'max'"),
        ({"application": {"metric": "l1"}}, "merges.x.application.metric: .*'cosine'.*found 'l1'"),
        ({"application": {"layer": "last"}}, "merges.x.application.layer: .*found 'last'"),
        ({"application": {"layer": 1.5}}, "merges.x.application.layer: .*found 1.5"),
        ({"application": {"score": "discriminant", "metric": "l2"}}, "metric has no meaning for score discriminant, "),
        ({"application": {"kind": "dynamic"}}, "merges.x.application: .*'static', 'se'"),
        ({"application": {"kind": None}}, "merges.x.application"),
    ],
)
def test_settings_that_se_refuses(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(se(tmp_path, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ties"}, "does not scale what method ties adds there as it is set; set normalize: false, or leave"),
        ({"method": "task_arithmetic", "normalize": True}, "set normalize: false, or leave lines out"),
        ({"method": "linear"}, "method linear adds there as it is set; leave lines out"),
        ({"method": "linear", "normalize": False}, "method linear adds there as it is set; leave lines out"),
        ({"lines": {"last": 1.0}}, "merges.x.lines.first"),
        ({"lines": {"first": -1.0}}, "merges.x.lines.first: .*greater than or equal to 0"),
        ({"lines": 0.5}, "merges.x.lines"),
    ],
)
def test_lines_that_would_mean_nothing(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    merges = {"x": {"method": "task_arithmetic", "lines": {"first": 0.5}} | settings}
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, merges=merges))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ties", "normalize": False},
        {"method": "iso_c", "coefficients": {"kind": "explicit", "weights": {"math": 1.0, "code": {"*": 0.5}}}},
        {"application": {"kind": "se"}, "coefficients": {"kind": "sens"}},
    ],
)
def test_lines_goes_with_methods_and_coefficients(settings: dict[str, Any], tmp_path: Path) -> None:
    tasks = {"math": TASK, "code": TASK}
    merges = {"x": {"method": "task_arithmetic", "lines": {"first": 0.5}} | settings}
    params = load_recipe(write(tmp_path, merges=merges, tasks=tasks)).merges["x"].params()
    assert (params["lines.first"], params["lines.last"]) == ("0.5", "1.0")


def test_static_takes_no_settings_of_se(tmp_path: Path) -> None:
    merges = {"x": {"method": "ties", "application": {"kind": "static", "temperature": 1.0}}}
    with pytest.raises(InputError, match=r"unknown key merges\.x\.application\.temperature"):
        load_recipe(write(tmp_path, merges=merges))


EVALUATED = {"kind": "completion", "evaluation": TASK["calibration"]}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "merges.x: application se needs tasks.code.calibration; add it"),
        ({"math": TASK}, "application se needs tasks.code.calibration"),
        ({"math": TASK, "code": EVALUATED}, "application se needs tasks.code.calibration"),
        ({"math": TASK, "code": {"kind": "lm_eval", "names": ["arc_easy"]}}, "se needs tasks.code.calibration"),
        ({"math": TASK, "code": LABELLED}, "merges.x: application se cannot compare classifiers with other kinds"),
    ],
)
def test_se_needs_calibration_sets_of_one_kind(tasks: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(se(tmp_path, tasks))


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"application": {"kind": "se"}}, "application se"), ({"coefficients": {"kind": "sens"}}, "coefficients sens")],
)
def test_what_compares_experts_needs_two(settings: dict[str, Any], what: str, tmp_path: Path) -> None:
    merges = {"x": {"method": "task_arithmetic"} | settings}
    with pytest.raises(InputError, match=f"merges.x: {what} compares experts, and there is one"):
        load_recipe(write(tmp_path, experts={"math": {"model": "m"}}, tasks={"math": TASK}, merges=merges))


def test_null_is_the_default_of_a_methods_setting() -> None:
    given = {"method": "ties", "normalize": None, "rescale": None, "density": 0.5}
    assert Variant.model_validate(given).method == Variant.model_validate({"method": "ties", "density": 0.5}).method


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": "all"}, "merges.ties.density: Input should be a valid number (found 'all')"),
        ({"density": {"math": "all", "code": 1.0}}, "merges.ties.density.math: Input should be a valid number"),
        (
            {"coefficients": {"kind": "explicit", "weights": {"math": {"*": "all"}, "code": 1.0}}},
            "merges.ties.coefficients.weights.math.*: Input should be a valid number",
        ),
    ],
)
def test_what_is_wrong_in_one_number_or_several_is_named_by_its_key(
    settings: dict[str, Any], said: str, llama_recipe: dict[str, Any], tmp_path: Path
) -> None:
    llama_recipe["merges"] = {"ties": {"method": "ties"} | settings}
    with pytest.raises(InputError, match=re.escape(f": {said}")):
        load_recipe(write_recipe(tmp_path, llama_recipe))


# What is tuned --------------------------------------------------------------------------------------------------------

TUNED_TASKS = {"math": TASK, "code": TASK}


def tuned(folder: Path, **settings: Any) -> Variant:
    merges = {"t": {"method": "task_arithmetic", **settings}}
    return load_recipe(write(folder, tasks=TUNED_TASKS, merges=merges)).merges["t"]


def test_auto_is_short_for_the_weights_that_are_usual_for_the_method(tmp_path: Path) -> None:
    variant = tuned(tmp_path, weight="auto")
    assert variant == tuned(tmp_path, tune={"weight": "auto"})
    assert variant.grid() == {"weight": list(METHODS["task_arithmetic"].weights)}
    assert load_recipe(write(tmp_path, tasks=TUNED_TASKS), ["merges.ta.weight=auto"]).merges["ta"].grid()


def test_candidates_are_sorted_and_differ(tmp_path: Path) -> None:
    sens = {"kind": "sens", "temperature": 0.3}
    variant = tuned(
        tmp_path, method="ties", coefficients=sens, tune={"density": [0.5, 0.2, 0.5], "temperature": [1, 0.1]}
    )
    assert variant.grid() == {"density": [0.2, 0.5], "temperature": [0.1, 1.0]}


@pytest.mark.parametrize(
    ("settings", "default"),
    [
        ({"weight": "auto"}, None),
        ({"tune": {"weight": [0.3]}}, None),
        ({"weight": 1.0, "tune": {"weight": [0.3]}}, {"weight": 1.0}),
        ({"weight": 1.0, "tune": {"lambda": [0.3]}}, None),
        ({"lambda": 0.5, "tune": {"lambda": [0.3], "weight": [0.3]}}, {"lambda": 0.5, "weight": 1.0}),
        (
            {"coefficients": {"kind": "sens", "temperature": 2.0}, "tune": {"temperature": [0.3]}},
            {"temperature": 2.0},
        ),
        ({"coefficients": {"kind": "sens"}, "tune": {"temperature": [0.3]}}, None),
    ],
)
def test_values_that_stay_are_those_that_the_recipe_gives(
    settings: dict[str, Any], default: Any, tmp_path: Path
) -> None:
    assert tuned(tmp_path, **settings).default() == default


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tune": {"density": [0.1]}}, "merges.t: tune.density: found density; expected some of weight, lambda"),
        ({"tune": {"temperature": [0.1]}}, "merges.t: tune.temperature: found temperature; expected some of weight"),
        ({"method": "ties", "tune": {"density": [0.1, 2]}}, "merges.t: tune.density: found 2.0; density is 2.0; expec"),
        ({"method": "ties", "tune": {"density": "auto"}}, "merges.t: tune.density: found auto; expected a list of num"),
        ({"tune": {"weight": [11]}}, "merges.t: tune.weight: found 11; expected a number from -10 to 10"),
        ({"tune": {"weight": []}}, r"merges.t.tune: weight: found \[\]; expected a list of numbers to try"),
        ({"tune": {"weight": 0.3}}, "merges.t.tune: weight: found 0.3; expected a list of numbers to try"),
        ({"weight": "auto", "tune": {"weight": [0.3]}}, "merges.t: weight: auto stands for tune: {weight: auto}"),
        ({"weight": "best"}, "merges.t.weight: .* valid number"),
        (
            {"tune": {"weight": [one / 200 for one in range(150)], "lambda": [one / 200 for one in range(1, 101)]}},
            "merges.t: tune: 15,000 combinations; expected at most 10,000: give fewer values",
        ),
        (
            {"method": "ties", "weight": "auto"},
            "merges.t: tune.weight: ties with these settings gives the same merge for every weight; set norm",
        ),
        ({"method": "linear", "weight": "auto"}, "merges.t: tune.weight: linear with these settings gives the same"),
        ({"method": "dare_ties", "tune": {"seed": [1, 2]}}, "merges.t: tune.seed: found seed; expected some of weight"),
        ({"weight": "auto", "application": {"kind": "se", "origin": "base"}}, "merges.t: tune is for static merges"),
    ],
)
def test_what_cannot_be_tuned(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tuned(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_tuning_needs_rows_of_every_task(tmp_path: Path) -> None:
    merges = {"t": {"method": "task_arithmetic", "weight": "auto"}}
    with pytest.raises(InputError, match=r"merges\.t\.tune needs tasks\.code\.tuning, or calibration to hold rows out"):
        load_recipe(write(tmp_path, tasks={"math": TASK}, merges=merges))
    named = {key: value for key, value in TASK.items() if key != "calibration"} | {"tuning": TASK["calibration"]}
    assert load_recipe(write(tmp_path, tasks={"math": TASK, "code": named}, merges=merges)).tuned_variants() == ["t"]
