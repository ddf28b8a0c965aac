"""The names that users import, which stay while files move."""

import hf_visual_peft


NAMES = [
    "Architecture",
    "BackboneError",
    "CachedFeatures",
    "FeatureCache",
    "Interpolation",
    "NotCalibratedError",
    "SplitAttention",
    "VisionBackbone",
    "VisualPeftConfig",
    "calibrate",
    "feature_pyramid",
    "find_backbone",
    "freeze_norms",
    "get_method",
    "hub",
    "interpolate",
    "list_methods",
    "merge_attention",
    "norms_with_statistics",
    "parameter_groups",
    "register_architecture",
    "register_heads",
    "split_attention",
    "thaw_norms",
    "with_visual_targets",
]


def test_public_names_stay():
    configs = [method.config_cls.__name__ for method in hf_visual_peft.list_methods().values()]
    missing = {*NAMES, *configs} - set(hf_visual_peft.__all__)
    assert not missing
    assert all(hasattr(hf_visual_peft, name) for name in hf_visual_peft.__all__)


def test_hub_can_be_reached_from_the_package():
    assert callable(hf_visual_peft.hub.push)
    assert callable(hf_visual_peft.hub.write_card)
