"""Zero-shot classifiers: CLIP's vision tower, and a head made of the names of classes by its text tower."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

CLASSES = "classifier.weight"
"""Name of the parameter that has a row for every class."""
PROJECTION = "visual_projection.weight"
"""Name of the parameter that leads from pictures to where texts lie."""


class CLIPZeroShotClassifier(CLIPPreTrainedModel):  # type: ignore[misc]
    """CLIP's vision tower with a row for every class: the logits are the products of a picture's direction with it.

    Those of transformers' `CLIPModel` for one text a class, if a row is the text's direction times exp(logit_scale).
    (`CLIPForImageClassification` is another network: the mean of all patches, a linear layer on it.)
    """

    config: CLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: CLIPVisionConfig) -> None:
        """Take the config of the tower, with as many labels as there are classes."""
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = CLIPVisionModel._from_config(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.classifier = nn.Linear(config.projection_dim, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Return the logits, (B, classes), of pictures (B, channels, height, width), and the loss of labels (B,)."""
        pooled = self.vision_model(pixel_values, **kwargs).pooler_output
        logits = self.classifier(normalize(self.visual_projection(pooled), dim=-1))
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
