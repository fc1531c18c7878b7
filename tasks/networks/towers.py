"""CLIP's towers: vision towers as experts with a head for their classes, and what the text tower makes of those.

A folder that stands for such a model (`tasks.checkpoints.views`) leaves the text tower out. An expert's has a row for
every class, which its checkpoint lacks, and the base's projection unless it has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModel, PretrainedConfig

from sensmerge.tasks.artifacts import load_object, write_json
from sensmerge.tasks.checkpoints.checkpoint import Checkpoint
from sensmerge.tasks.checkpoints.companions import CONFIG, companions, copy_companions
from sensmerge.tasks.checkpoints.views import Gathered, Stretch, Taken, VocabularyView, write_view
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.networks.base import open_base
from sensmerge.tasks.networks.names import names_of
from sensmerge.tasks.networks.networks import fill_network, load_tokenizer, skeleton
from sensmerge.tasks.networks.tokens import batches, class_tokens, pad
from sensmerge.tasks.networks.views import link_weights
from sensmerge.tasks.networks.zero_shot import CLASSES, PROJECTION, CLIPZeroShotClassifier

HEAD = "head.safetensors"
"""File with the rows of an expert's classes."""
BATCH = 256
"""Texts that the text tower reads at once, of full length."""
_TOWER = ("text_model.", "text_projection.")
"""How the keys of a text tower begin."""
_TEXTS = (*_TOWER, "logit_scale")
"""How those begin that only texts need."""


@dataclass(frozen=True)
class Clip:
    """A whole CLIP, or its vision tower, as far as headers and config tell."""

    key: str
    """`base`, or the recipe key of an expert"""
    checkpoint: Checkpoint
    config: PretrainedConfig

    def __post_init__(self) -> None:
        """Refuse other models.

        Raises:
            InputError: it is neither.
        """
        if not isinstance(self.config, CLIPConfig | CLIPVisionConfig):
            raise InputError(
                f"{self.key}: {self.folder} has model_type {self.config.model_type!r}; zero_shot makes heads of CLIP "
                "alone: expected a CLIPModel, or the vision tower of one"
            )

    @property
    def folder(self) -> Path:
        """Folder of the model."""
        return self.checkpoint.folder

    @property
    def is_whole(self) -> bool:
        """Whether it has a text tower."""
        return isinstance(self.config, CLIPConfig)

    @property
    def vision(self) -> CLIPVisionConfig:
        """Config of its vision tower."""
        return self.config.vision_config if isinstance(self.config, CLIPConfig) else self.config

    @cached_property
    def keys(self) -> dict[str, str]:
        """The key of every tensor by its name."""
        names = names_of(skeleton(self.config, None, self.folder))
        return {name: names.key(name) for name in self.checkpoint.tensors}

    def tensor(self, key: str) -> str | None:
        """Return the name of the tensor with a key; None if there is none."""
        return next((name for name, one in self.keys.items() if one == key), None)


def tower_view(model: Clip, base: Clip, classes: int) -> VocabularyView:
    """Return a vision tower; in what it says of folders, that of the base is `base`, and that of the head `HEAD`.

    Args:
        model: whose tower it is.
        base: of all experts.
        classes: how many classes the head has; 0 for a tower without one.

    Raises:
        InputError: neither the model nor the base has a projection.
    """
    alone = _TEXTS if classes else (*_TEXTS, PROJECTION)
    left_out = [name for name, key in model.keys.items() if model.is_whole and key.startswith(alone)]
    tensors = {}
    if classes:
        file = next(iter(model.checkpoint.tensors.values())).file
        owner = next((one for one in (model, base) if one.tensor(PROJECTION) is not None), None)
        if owner is None:
            raise InputError(
                f"{model.key}: {model.folder} has no {PROJECTION}, nor has the base; expected a whole CLIPModel as base"
            )
        info = owner.checkpoint.tensors[str(owner.tensor(PROJECTION))]
        width, rows = info.shape[0], (Stretch(0, 0, info.shape[0]),)
        if owner is base:
            taken = Taken("base", info.file, str(base.tensor(PROJECTION)), rows)
            tensors[PROJECTION] = Gathered(0, info.dtype, info.shape, file, (taken,))
        head = Taken(HEAD, HEAD, CLASSES, (Stretch(0, 0, classes),))
        tensors[CLASSES] = Gathered(0, "F32", (classes, width), file, (head,))
    return VocabularyView(tensors, tuple(left_out), ())


def tower_config(model: Clip, projection: int, classes: Sequence[str]) -> dict[str, Any]:
    """Return the `config.json` of a vision tower that ends in a head for some classes, or in none."""
    written = model.vision.to_dict() if model.is_whole else load_object(model.folder / CONFIG)
    network = CLIPZeroShotClassifier if classes else CLIPVisionModel
    written |= {"architectures": [network.__name__], "projection_dim": projection}
    if classes:
        written["id2label"] = {str(number): name for number, name in enumerate(classes)}
        written["label2id"] = {name: number for number, name in enumerate(classes)}
    return written


def fill_tower(model: Clip, view: VocabularyView, config: dict[str, Any], target: Path) -> None:
    """Write a folder, which is there and empty, that stands for a model's vision tower."""
    copy_companions(companions(model.folder), target)
    write_json(target / CONFIG, config)
    link_weights(model.checkpoint, target)
    write_view(view, target)


# Texts ---------------------------------------------------------------------------------------------------------------


def class_texts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return what stands for classes: the name of each in the place of `{}` in every template."""
    return [template.replace("{}", name) for name in names for template in templates]


def check_texts(folder: Path, config: CLIPConfig, names: Sequence[str], templates: Sequence[str], key: str) -> None:
    """Check that a text tower takes what stands for the classes; `key` names the recipe's key of classes.

    Raises:
        InputError: a text is too long; there is no tokenizer.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        raise InputError(f"{key} needs the tokenizer of a text tower; {error}") from None
    most = config.text_config.max_position_embeddings
    for text in class_texts(names, templates):
        count = len(class_tokens(text, tokenizer))
        if count > most:
            raise InputError(
                f"{key}: {text!r} has {count} tokens, and the text tower of {folder} takes {most}; expected a shorter "
                "name, or a shorter template"
            )


def class_rows(folder: Path, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the rows of a head that tells classes apart, float32, (classes, width of the projection).

    A row is the mean over templates of the directions of their texts, made as long as exp(logit_scale): as CLIP's
    authors make classifiers (arXiv 2103.00020, section 3.1.4).

    Args:
        folder: of a whole CLIP.
        names: of the classes.
        templates: of their texts.
    """
    base, tokenizer = open_base(folder), load_tokenizer(folder)
    stored = {base.names.spelled(base.names.key(name)): name for name in base.weights}
    scale = base.read(stored["logit_scale"]).float().exp()
    config = base.config.text_config
    config.projection_dim, config.architectures = base.config.projection_dim, [CLIPTextModelWithProjection.__name__]
    tensors = {key: base.read(name) for key, name in stored.items() if key.startswith(_TOWER)}
    network = fill_network(config, None, tensors, torch.float32, "cpu", folder)
    texts = [class_tokens(text, tokenizer) for text in class_texts(names, templates)]
    found = torch.empty(len(texts), config.projection_dim)
    for chosen in batches([len(ids) for ids in texts], BATCH):
        batch = pad([texts[place] for place in chosen], tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            embedded = network(**batch).text_embeds
        found[chosen] = normalize(embedded, dim=-1)
    return scale * normalize(found.view(len(names), len(templates), -1).mean(1), dim=-1)
