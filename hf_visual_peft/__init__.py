"""Parameter-efficient fine-tuning for vision models.

Importing this package registers its methods with peft; plain `peft` does the rest:

    import hf_visual_peft
    from peft import get_peft_model

    model = get_peft_model(vit, hf_visual_peft.VPTConfig())
"""

from typing import TYPE_CHECKING, Any

from . import third_party_notices  # noqa: F401  first: the notices come while peft is imported


# isort: split
from .backbones.architectures import Architecture, register_architecture, register_heads
from .backbones.backbone import BackboneError, VisionBackbone
from .backbones.finding import find_backbone
from .backbones.frozen_norms import freeze_norms, norms_with_statistics, thaw_norms
from .backbones.split_attention import SplitAttention, merge_attention, split_attention
from .core.adapter_files import teach_files
from .core.auxiliary import auxiliary_loss
from .core.calibration import NotCalibratedError, calibrate
from .core.config import VisualPeftConfig
from .core.labels import teach_peft
from .core.registry import get_method, list_methods
from .core.switching import teach_enabling
from .features import CachedFeatures, FeatureCache
from .features.pyramid import feature_pyramid
from .language.averaging import GaussianAverage
from .language.classifier import ZeroShotClassifier
from .language.classifier_config import ZeroShotConfig
from .language.config import list_language_methods
from .language.loading import load_classifier
from .language.lora import clip_lora
from .language.methods import load_methods as load_language_methods
from .language.methods.two_sfs import second_stage
from .language.retrieval import recall_at_k
from .language.support import fit
from .methods import load_methods
from .methods.prefix.prefix_tuning import store_prefixes
from .methods.prompt.e2vpt import prune_prompts
from .peft_methods.defaults import teach_targets
from .peft_methods.methods import with_visual_targets
from .peft_methods.nesting import teach_nesting
from .sharing import hub
from .training.interpolation import Interpolation, interpolate
from .training.parameters import parameter_groups
from .version import __version__  # noqa: F401


load_methods()
load_language_methods()
teach_enabling()
teach_files()
teach_peft()
teach_targets()
teach_nesting()
_CONFIGS: dict[str, Any] = {method.config_cls.__name__: method.config_cls for method in list_methods().values()}
_CONFIGS |= {method.config_cls.__name__: method.config_cls for method in list_language_methods().values()}
globals().update(_CONFIGS)

__all__ = [
    "Architecture",
    "BackboneError",
    "CachedFeatures",
    "FeatureCache",
    "Interpolation",
    "NotCalibratedError",
    "SplitAttention",
    "VisionBackbone",
    "VisualPeftConfig",
    "ZeroShotClassifier",
    "ZeroShotConfig",
    "auxiliary_loss",
    "calibrate",
    "clip_lora",
    "feature_pyramid",
    "find_backbone",
    "fit",
    "freeze_norms",
    "get_method",
    "hub",
    "interpolate",
    "GaussianAverage",
    "list_language_methods",
    "list_methods",
    "load_classifier",
    "merge_attention",
    "norms_with_statistics",
    "parameter_groups",
    "recall_at_k",
    "prune_prompts",
    "register_architecture",
    "register_heads",
    "second_stage",
    "split_attention",
    "store_prefixes",
    "thaw_norms",
    "with_visual_targets",
    *_CONFIGS,
]

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[VisualPeftConfig]:
        """Tell type checkers that the configs of all method files are attributes here."""
