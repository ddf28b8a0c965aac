"""Dual encoders of OpenCLIP, as models of transformers."""

from __future__ import annotations

import copy
import json
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file


CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipConfig(PreTrainedConfig):
    """Config of `OpenClipDualEncoder`.

    Args:
        architecture: `model_cfg` of OpenCLIP.
        kwargs: as of every config.
    """

    model_type = "open_clip"

    def __init__(self, architecture: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.architecture = architecture


class OpenClipDualEncoder(PreTrainedModel):
    """A dual encoder of OpenCLIP, with the functions that those of transformers have.

    Args:
        config: with the architecture.

    Raises:
        ValueError: the text tower is one of transformers, or the model also writes texts.
    """

    config_class = OpenClipConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__(config)
        from open_clip.model import CustomTextCLIP

        architecture = copy.deepcopy(config.architecture or {})
        if "multimodal_cfg" in architecture or architecture["text_cfg"].get("hf_model_name"):
            raise ValueError(
                "This model of OpenCLIP has a text tower of transformers, or writes texts (CoCa). Valid are models "
                "with OpenCLIP's own text tower; for others make a VisionTextDualEncoderModel."
            )
        architecture.pop("custom_text", None)
        if "timm_model_name" in architecture["vision_cfg"]:
            architecture["vision_cfg"]["timm_model_pretrained"] = False
        self.model = CustomTextCLIP(**architecture)
        for module in self.model.modules():
            module._is_hf_initialized = True  # OpenCLIP has done it
        self.post_init()

    @classmethod
    def from_open_clip(cls, checkpoint: str, **where: Any) -> OpenClipDualEncoder:
        """Load from a folder or repository as OpenCLIP writes them.

        Args:
            checkpoint: the folder or repository.
            where: `revision` and the like.

        Raises:
            ValueError: there are no weights.
        """
        from open_clip import load_checkpoint

        with open(cached_file(checkpoint, CONFIG_FILE, **where), encoding="utf-8") as file:
            model = cls(OpenClipConfig(json.load(file)["model_cfg"]))
        found = (
            cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **where)
            for name in WEIGHTS_FILES
        )
        weights = next((path for path in found if path is not None), None)
        if weights is None:
            raise ValueError(f"{checkpoint} has {CONFIG_FILE}, but none of {', '.join(WEIGHTS_FILES)}.")
        load_checkpoint(model.model, weights)
        return model.eval()

    def restore_masks(self) -> None:
        """Make what no file holds again: the causal mask, after loading on the meta device."""
        text = self.model.text
        if getattr(text, "attn_mask", None) is not None:
            text.attn_mask = text.build_causal_mask().to(text.token_embedding.weight.device)

    @property
    def text_model(self) -> nn.Module:
        """The text tower."""
        return self.model.text

    @property
    def vision_model(self) -> nn.Module:
        """The image tower."""
        return self.model.visual

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor in the logits."""
        return self.model.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What is added to the logits."""
        return self.model.logit_bias

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Features of images, not normalised."""
        return self.model.encode_image(pixel_values)

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        """Features of texts, not normalised."""
        return self.model.encode_text(input_ids)


def is_open_clip(checkpoint: str, **where: Any) -> bool:
    """Whether a folder or repository is one of OpenCLIP, and not of transformers as well.

    Args:
        checkpoint: the folder or repository.
        where: `revision` and the like.
    """
    there = [
        cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **where) is not None
        for name in (CONFIG_FILE, "config.json")
    ]
    return there == [True, False]


AutoConfig.register(OpenClipConfig.model_type, OpenClipConfig)
AutoModel.register(OpenClipConfig, OpenClipDualEncoder)
