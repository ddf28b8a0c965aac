"""The roles found by watching a model run are those that its role table gives."""

from __future__ import annotations

from typing import Any

import pytest

from hf_visual_peft.backbones.backbone import ALL_ROLES, BLOCK_ROLES, Block, VisionBackbone
from hf_visual_peft.backbones.choosing import choose
from hf_visual_peft.backbones.finding import _Resolver
from hf_visual_peft.backbones.found import look_at
from hf_visual_peft.backbones.paths import is_in
from hf_visual_peft.coverage.models import MODELS


# What a table says and nobody can see in one run of the model on an image, by model.
_BIAS = "the module that makes the bias on the logits can be asked for other numbers of tokens"
_STEM = {"patch_embedding": "the table names another convolution of the stem"}
_ALONE = "its attention is not a softmax of queries and keys, which have roles all the same"
SAYS: dict[str, dict[str, str]] = {
    "beit": {"prompts": _BIAS},
    "data2vec-vision": {"prompts": _BIAS},
    "beit_segmentation": {"prompts": _BIAS},
    "timesformer": dict.fromkeys(
        ("prompts", "softmax", "prefix_tokens", "sublayers", "entrances", "readers", "roles"),
        "frames and cells take turns in the batch",
    ),
    "perceiver": dict.fromkeys(("patch_embedding", "input_norms"), "its cross-attention reads the pixels"),
    "levit": dict.fromkeys(("prompts", "softmax"), "the biases on its logits stand for positions"),
    "swiftformer": dict.fromkeys(("roles", "readers"), _ALONE) | _STEM,
    "mobilevitv2": dict.fromkeys(("roles", "equal_parts"), _ALONE),
    "mobilenet_v2": _STEM,
    "hgnet_v2": _STEM,
    "rt_detr_resnet": _STEM,
    "timm_maxvit": _STEM,
    "timm_efficientformer": dict.fromkeys(
        ("sublayers", "entrances", "readers", "roles"), "the table leaves its attention to operations"
    )
    | _STEM,
}
UNSEEN = {  # their backbones take no images
    "imagegpt": "its tokens are colours",
}
BLOCK_FIELDS = ("width", "num_heads", "sublayers", "post_norm", "pools", "rest")
# how the tokens lie is told by arguments of the blocks or the embeddings, or by methods
TOLD_GRIDS = ("given", "units", "halved", "unfolded", "masked", "frames_last", "spatial_shapes")
TABLE_FIELDS = ("stream", "stream_inside", "prompts", "softmax", "grid", "equal_parts")


def both(name: str) -> tuple[VisionBackbone, VisionBackbone]:
    """The backbone of a tiny model by its table, and as it is found."""
    model = MODELS[name].model()
    choice = choose(model)
    assert choice is not None
    path, backbone, table = choice
    listed = _Resolver(model, path, backbone, table).resolve()
    found = _Resolver(model, path, backbone, look_at(model, path).table).resolve()
    return listed, found


def differences(listed: VisionBackbone, found: VisionBackbone) -> dict[str, Any]:
    """What the two say differently, by field."""
    made: dict[str, Any] = {}

    def compare(field: str, one: Any, other: Any) -> None:
        if one != other:
            made.setdefault(field, (one, other))

    compare("patch_embedding", listed.patch_embedding, found.patch_embedding)
    compare("input_norms", listed.input_norms, found.input_norms)
    # the look takes all norms outside for what they are; a table may leave out those of a neck
    norms = {path for path in listed.norms if is_in(path, listed.path)}
    compare("final_norms", norms - {*found.norms, *found.modules(ALL_ROLES)}, set())
    by_path = {block.path: block for block in found.blocks}
    compare("blocks", {block.path for block in listed.blocks} - set(by_path), set())
    for one, other in ((block, by_path[block.path]) for block in listed.blocks if block.path in by_path):
        compare("prefix_tokens", one.prefix_tokens, other.prefix_tokens)
        # what a table names has a role, or is an operation
        compare("modules", set(one.modules(ALL_ROLES)) - set(other.modules(ALL_ROLES)), set())
        if not one.sublayers:  # tables of convolutional networks leave out where branches could stand
            continue
        for field in BLOCK_FIELDS:
            compare(field, getattr(one, field), getattr(other, field))
        compare("entrances", *_entered(one, other))
        compare("readers", {k: set(v) for k, v in one.readers.items()}, {k: set(v) for k, v in other.readers.items()})
        for role in BLOCK_ROLES:
            compare("roles", (role, one.roles[role]), (role, other.roles[role]))
        assert one.table is not None
        assert other.table is not None
        for field in TABLE_FIELDS if "attention" in one.sublayers else ("stream", "stream_inside", "grid"):
            compare(field, getattr(one.table, field), getattr(other.table, field))
    if listed.architecture.grid in TOLD_GRIDS:
        made.pop("grid", None)
    return made


def _entered(listed: Block, found: Block) -> tuple[dict[str, str], dict[str, str]]:
    """Where sub-layers read the stream: what holds a module alone reads the same."""
    one, other = dict(listed.entrances), dict(found.entrances)
    for sublayer in set(one) & set(other):
        if is_in(one[sublayer], other[sublayer]) or is_in(other[sublayer], one[sublayer]):
            other[sublayer] = one[sublayer]
    return one, other


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNSEEN])
def test_what_is_found_is_what_the_table_says(name: str):
    if MODELS[name].missing_package:
        pytest.skip(f"needs {MODELS[name].missing_package}")
    told = SAYS.get(name, {})
    found = differences(*both(name))
    assert {field: value for field, value in found.items() if field not in told} == {}
    assert set(told) <= set(found), "the table need not say this: it is found"
