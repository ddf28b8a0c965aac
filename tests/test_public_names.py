"""The names that users import. Files may move; these stay."""

from __future__ import annotations

import hf_visual_peft


NAMES = {
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
    "calibrate",
    "clip_lora",
    "feature_pyramid",
    "find_backbone",
    "fit",
    "freeze_norms",
    "get_method",
    "interpolate",
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
    "split_attention",
    "store_prefixes",
    "thaw_norms",
    "with_visual_targets",
}
CONFIGS = {
    "AIMConfig",
    "ARCConfig",
    "AdaptFormerConfig",
    "AdapterBiasConfig",
    "AdapterPlusConfig",
    "AttnScaleConfig",
    "BiAdaptFormerConfig",
    "BiLoRAConfig",
    "BitFitConfig",
    "CVPTConfig",
    "CompacterConfig",
    "ConsolidatorConfig",
    "ConvpassConfig",
    "DTLConfig",
    "DiffFitConfig",
    "E2VPTConfig",
    "E3VAConfig",
    "EFFTConfig",
    "FacTConfig",
    "GPSConfig",
    "GatedPromptConfig",
    "HSTConfig",
    "HoulsbyConfig",
    "HydraConfig",
    "KAdaptationConfig",
    "LASTConfig",
    "LSTConfig",
    "LinearProbeConfig",
    "LoRandConfig",
    "MoSAConfig",
    "MonaConfig",
    "PartialConfig",
    "PfeifferConfig",
    "PrefixConfig",
    "ProVPConfig",
    "RLRRConfig",
    "RepAdapterConfig",
    "ResTuningConfig",
    "SCTConfig",
    "SNELLConfig",
    "SNFConfig",
    "SPTConfig",
    "SSFConfig",
    "STAdapterConfig",
    "SharedLoRAConfig",
    "SideTuningConfig",
    "VAPTConfig",
    "VFPTConfig",
    "VPTConfig",
    "VQTConfig",
    "ViTAdapterConfig",
}


def test_public_names_are_there():
    configs = {method.config_cls.__name__ for method in hf_visual_peft.list_methods().values()}
    assert configs >= CONFIGS
    assert set(hf_visual_peft.__all__) >= NAMES | configs
    assert all(hasattr(hf_visual_peft, name) for name in hf_visual_peft.__all__)
    assert hf_visual_peft.__version__
    assert callable(hf_visual_peft.hub.push)
