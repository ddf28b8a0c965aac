"""Targets for peft's own methods on vision transformers, where peft has none.

`LNTuningConfig()` trains the norms of a model; which these are peft looks up by the `model_type` of its config. Here
the model types of the role tables get theirs, so that on ViT-B/16 all norms of the blocks and the one behind them
train, 38,400 parameters.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft.utils import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as NORMS_BY_MODEL_TYPE


if TYPE_CHECKING:
    from .architectures import Architecture


_added: dict[str, str] = {}


def add_defaults(architecture: Architecture) -> None:
    """Tell peft the norms of an architecture. What peft or the user has said about a model type stays.

    Args:
        architecture: whose `model_types` get an entry, or a new one where the present one is from here.
    """
    for model_type in architecture.model_types:
        if NORMS_BY_MODEL_TYPE.get(model_type) == _added.get(model_type):
            NORMS_BY_MODEL_TYPE[model_type] = _added[model_type] = norms_of(architecture)


def norms_of(architecture: Architecture) -> str:
    """A regular expression for the full names of all norms of the backbone.

    Names alone would not do: norms inside attention or a decoder may be called the same, and those in the text tower
    of CLIP and SigLIP are. A pattern cannot see a model's options, so two norms need naming in `target_modules`:

    - Norms of the pooled output match where the backbone is the whole model only. Inside another one image
      classification does not read them, and parameters without a gradient stop distributed training; contrastive
      training (`CLIPModel`) and `CLIPVisionModelWithProjection` do.
    - Of several norms behind the blocks the last one alone matches: BEiT and Data2Vec-Vision have one of two, and in
      place of the other an `nn.Identity`, which peft cannot wrap. With `use_mean_pooling=False`, which is not
      transformers' default, it is the other one, `layernorm`.

    Args:
        architecture: the role table.
    """

    def one_of(*names: str) -> str:
        return f"(?:{'|'.join(names)})"

    def pattern(name: str) -> str:
        return re.escape(name).replace(r"\*", r"\w+")

    in_block = one_of(*(pattern(name) for name in (*architecture.norm1, *architecture.norm2)))
    outside = (pattern(name) for name in (*architecture.input_norms, *architecture.norms[-1:]))
    lists = (architecture.blocks,) if isinstance(architecture.blocks, str) else architecture.blocks
    anywhere = one_of(rf"{one_of(*map(pattern, lists))}\.\d+\.{in_block}", *outside)
    pooled = "".join(f"|{pattern(name)}" for name in architecture.pooled_norms)
    return rf"(?!(?:.*\.)?text_model\.)(?:.*\.)?{anywhere}{pooled}"
