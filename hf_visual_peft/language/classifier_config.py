"""What a `ZeroShotClassifier` is made from, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput

from .templates import DEFAULT, check_templates
from .tokens import check_names


class ZeroShotConfig(PreTrainedConfig):
    """Config of `ZeroShotClassifier`.

    Args:
        encoder_config: config of the dual encoder, or its dictionary.
        class_names: of the classes, in the order of the logits.
        templates: texts around a class name.
        normalize_before_mean: with several templates: whether features are normalised before their mean is taken (as
            in CLIP and Tip-Adapter), else the mean of raw features is normalised (as in TaskRes, CLAP, PromptSRC).
        class_chunk: number of texts that are encoded at once.
        stored_classes: classes with weights of their own, which merging an adapter fills in.
        kwargs: as of every config.
    """

    model_type = "zero_shot_classifier"
    sub_configs = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference = ("image_embeds", "text_embeds")
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: Any = None,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | str = DEFAULT,
        normalize_before_mean: bool = True,
        class_chunk: int = 256,
        stored_classes: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if class_names is not None:
            names = check_names(class_names)
            kwargs["id2label"] = dict(enumerate(names))
            kwargs["label2id"] = {name: index for index, name in enumerate(names)}
        super().__init__(**kwargs)
        if isinstance(encoder_config, dict):
            encoder_config = AutoConfig.for_model(**encoder_config)
        self.encoder_config = encoder_config  # after the call above, which would reset its choice of attention
        self.templates = check_templates(templates)
        self.normalize_before_mean = normalize_before_mean
        if type(class_chunk) is not int or class_chunk < 1:
            raise ValueError(f"class_chunk is {class_chunk!r}: must be an integer of at least 1.")
        self.class_chunk = class_chunk
        self.stored_classes = stored_classes


@dataclass
class ZeroShotOutput(ImageClassifierOutput):
    """Output of `ZeroShotClassifier`: as of every image classifier, and the features that were compared.

    Attributes:
        image_embeds: normalised features of the images, (images, width).
        text_embeds: normalised features of the classes, (classes, width); (images, classes, width) if a method
            computes them for each image.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
