import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    BertModel,
    CanineConfig,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from sensmerge.tasks.checkpoints.companions import has_tokenizer
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.networks import (
    describe,
    fill_network,
    has_network,
    load_config,
    load_tokenizer,
    network_class,
    reads_images,
    skeleton,
)
from tests.conftest import bert_config, gpt2_config, llama_config, make_bert_trunk, make_llama


def write_config(folder: Path, config: object) -> Path:
    """Write a config, and beside it code of the model's own that leaves a trace when it runs."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (folder / "evil.py").write_text(
        f"open({str(folder / 'it-ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Evil, PreTrainedTokenizerFast as EvilTokenizer\n"
    )
    return folder


def llama(**changes: object) -> dict[str, object]:
    return llama_config().to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes


def refused(folder: Path) -> str:
    """Return the one line with which a model's config is refused."""
    with pytest.raises(InputError) as error:
        skeleton(load_config(folder), None, folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert "\n" not in message
    return message


def test_a_config(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, llama()))
    assert isinstance(config, LlamaConfig)
    assert config.hidden_size == 32


def test_no_config(tmp_path: Path) -> None:
    assert "no such file; expected a Hugging Face model folder" in refused(tmp_path)


@pytest.mark.parametrize("text", ["{bad", "", "\ud800"])
def test_invalid_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    assert "not valid JSON" in refused(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "unheard-of"},
        {"model_type": 5},
        {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Evil"}},
        {"auto_map": {"AutoConfig": "evil.Evil"}},
        {"model_type": "llama", "hidden_size": "large"},
        {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 3},
    ],
    ids=str,
)
def test_a_config_that_transformers_does_not_know(config: object, tmp_path: Path) -> None:
    assert "code of a model is never run" in refused(write_config(tmp_path, config))
    assert not (tmp_path / "it-ran").exists()


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 64}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("vocab_size", value) for value in (0, -5, 2**40, 1.5, True)),
        *(("num_hidden_layers", value) for value in (0, 10**6, 10**30)),
        *(("num_attention_heads", value) for value in (0, -1, 2**30)),
        *(("hidden_size", value) for value in (0, 2**40)),
        ("intermediate_size", 2**50),
        ("num_key_value_heads", -2),
    ],
)
def test_sizes_that_no_model_has(key: str, value: object, tmp_path: Path) -> None:
    said = refused(write_config(tmp_path, LLAMA | {key: value}))
    assert "expected a whole number from" in said or "not the config of a model" in said
    assert len(said) < 500


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 0}, {"num_attention_heads": 3, "head_dim": 0}])
def test_settings_of_which_no_network_can_be_built(changes: dict[str, object], tmp_path: Path) -> None:
    folder = write_config(tmp_path, LLAMA | changes)
    with pytest.raises(InputError) as caught:
        skeleton(load_config(folder), "causal_lm", folder)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    assert "holds a list; expected a JSON object" in refused(write_config(tmp_path, []))


def test_code_beside_a_known_model_is_not_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
    config = load_config(write_config(tmp_path, llama(auto_map=auto_map)))
    assert type(config) is LlamaConfig
    assert network_class(config, None, tmp_path) is network_class(config, "causal_lm", tmp_path) is LlamaForCausalLM
    assert not (tmp_path / "it-ran").exists()


def test_quantised_weights(tmp_path: Path) -> None:
    quantised = llama(quantization_config={"quant_method": "gptq", "bits": 4})
    assert "the weights are quantised (quantization_config)" in refused(write_config(tmp_path, quantised))


@pytest.mark.parametrize(
    "architectures",
    [None, [], ["LlamaForTelepathy"], ["pipeline"], ["AutoModel"], ["LlamaConfig"], ["BertModel"]],
    ids=str,
)
def test_an_architecture_that_is_no_network_of_the_model_type(architectures: Any, tmp_path: Path) -> None:
    message = refused(write_config(tmp_path, llama(architectures=architectures)))
    assert f"architectures = {architectures!r}" in message
    assert "'llama'" in message


def test_network_class(tmp_path: Path) -> None:
    assert network_class(llama_config(), "classification", tmp_path) is LlamaForSequenceClassification
    assert network_class(bert_config(), "classification", tmp_path) is BertForSequenceClassification
    assert network_class(load_config(write_config(tmp_path, llama())), None, tmp_path) is LlamaForCausalLM
    vision = load_config(write_config(tmp_path, {"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(InputError, match="no causal_lm network for model_type 'vit'"):
        network_class(vision, "causal_lm", tmp_path)


def test_language_models_that_read_images(tmp_path: Path) -> None:
    llava = LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    assert network_class(llava, "causal_lm", tmp_path) is LlavaForConditionalGeneration
    assert has_network(llava, "causal_lm")
    assert [reads_images(one) for one in (llava, llama_config(), bert_config(), Gemma3Config())] == [True] + 3 * [False]


def test_a_skeleton_has_no_memory(tmp_path: Path) -> None:
    network = skeleton(llama_config(hidden_size=4096, vocab_size=200_000), "causal_lm", tmp_path)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert network.get_input_embeddings().weight.shape == (200_000, 4096)


def test_fill_network_names_what_is_missing(tmp_path: Path) -> None:
    weights = make_llama().state_dict()
    for changed in (
        {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"},
        weights | {"model.norm.weight": torch.ones(7)},
    ):
        with pytest.raises(InputError, match=rf"{tmp_path}: no fitting weights for model.norm.weight of LlamaFor"):
            fill_network(llama_config(), "causal_lm", changed, torch.float32, "cpu", tmp_path)


def test_fill_network(tmp_path: Path) -> None:
    source = make_llama()
    weights = source.state_dict() | {"something.else": torch.ones(3)}
    network = fill_network(llama_config(), "causal_lm", weights, torch.float64, "cpu", tmp_path)
    assert not network.training
    assert all(torch.equal(tensor, source.state_dict()[name].double()) for name, tensor in network.state_dict().items())


@pytest.fixture
def tokenizer_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_tokenizer(tokenizer_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert has_tokenizer(tokenizer_folder)
    assert load_tokenizer(tokenizer_folder)("1+2=").input_ids == tokenizer("1+2=").input_ids


def test_no_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(write_config(tmp_path, llama()))
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_vocabulary(tmp_path: Path) -> None:
    """From no files at all, transformers makes a BERT's tokenizer that knows no word."""
    make_bert_trunk().save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match=r"no usable tokenizer \(there is no tokenizer\.json or vocab\.txt\); get its"):
        load_tokenizer(tmp_path / "bert")
    CanineConfig().save_pretrained(tmp_path / "canine")  # its tokens are characters
    assert load_tokenizer(tmp_path / "canine")("a", add_special_tokens=False)["input_ids"] == [ord("a")]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{bad"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "OfTomorrow"}}'),
        ("tokenizer_config.json", "{bad"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [null, "evil.EvilTokenizer"]}}',
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used(file: str, text: str, tokenizer_folder: Path) -> None:
    write_config(tokenizer_folder, llama())
    (tokenizer_folder / file).write_text(text)
    with pytest.raises(InputError, match=r"no usable tokenizer|not valid JSON") as error:
        load_tokenizer(tokenizer_folder)
    assert str(error.value).startswith(str(tokenizer_folder))
    assert "\n" not in str(error.value)
    assert not (tokenizer_folder / "it-ran").exists()


def test_describe() -> None:
    gpt2 = describe(gpt2_config())
    assert (gpt2["model_type"], gpt2["hidden_size"], gpt2["num_hidden_layers"]) == ("gpt2", 32, 2)
    assert describe(llama_config()) == describe(llama_config(rope_theta=5e5, max_position_embeddings=64))
    assert describe(llama_config())["num_key_value_heads"] == 2
    assert describe(BertModel(bert_config(2)).config) == describe(bert_config(7))
