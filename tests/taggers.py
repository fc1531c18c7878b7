"""Tiny networks that tag words, and a tokenizer that reads these."""

import torch
from tokenizers import pre_tokenizers
from transformers import BertForTokenClassification, BertModel, PreTrainedTokenizerFast

from tests.conftest import bert_config, make_tokenizer, perturbed


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """The tests' tokenizer with a space before every word."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def make_tagger(trunk: BertModel, seed: int, names: list[str]) -> BertForTokenClassification:
    """A fine-tune whose head is far from giving every token one class."""
    torch.manual_seed(seed)
    network = BertForTokenClassification(bert_config(len(names)))
    network.bert.load_state_dict(trunk.state_dict(), strict=False)
    network.config.id2label = dict(enumerate(names))
    network.config.label2id = {name: number for number, name in enumerate(names)}
    network.classifier.weight.data *= 30
    return perturbed(network, seed, 0.05)
