"""Text for `roles` and `explain`: the roles of a model's modules, and where methods act on it."""

from __future__ import annotations

import pprint
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..backbones.architectures import Architecture
from ..backbones.backbone import ALL_ROLES, Block, VisionBackbone
from ..backbones.choosing import choose
from ..backbones.finding import find_backbone
from ..backbones.found import look_at
from ..core.placing import placements_of
from ..core.registry import list_methods
from ..tables import terminal_table


def load_model(name: str) -> nn.Module:
    """A model with random weights, by its name.

    Args:
        name: a folder or Hub id with a config of transformers or timm, or the name of a model of timm.

    Raises:
        ValueError: no library knows the name.
    """
    import timm

    if not Path(name).exists() and "/" not in name and timm.is_model(name):
        return timm.create_model(name).eval()
    if name.startswith(("hf-hub:", "local-dir:")):
        return timm.create_model(name).eval()
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, TimmWrapperForImageClassification

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is not a folder or Hub id that transformers can read, nor a model of timm: {error}"
        ) from error
    if config.model_type == "timm_wrapper":
        return TimmWrapperForImageClassification(config).eval()
    for auto in (AutoModelForImageClassification, AutoModel):
        if type(config) in auto._model_mapping:
            return auto.from_config(config).eval()
    raise ValueError(f"{name!r} is a {config.model_type}: transformers has no model for images of this kind.")


def describe_roles(model: nn.Module) -> str:
    """The roles of a model's modules as a table, and as the code that registers them.

    Args:
        model: a backbone, or a model that holds one.

    Raises:
        BackboneError: none can be found.
    """
    backbone = find_backbone(model)
    listed = choose(model) is not None
    source = "a role table names its parts" if listed else "found by watching it run"
    place = f" at {backbone.path!r}" if backbone.path else ""
    parts = [
        f"{backbone.class_name}{place}: {backbone.depth} blocks, {source}.",
        terminal_table(("role", "modules"), list(_outside(backbone))),
    ]
    for block, count in _kinds(model, backbone):
        name = type(model.get_submodule(block.path)).__name__
        parts += [
            f"{name}, as {block.path!r} ({count} alike):",
            terminal_table(("role", "modules"), list(_inside(block))),
        ]
    if not listed:
        seen = look_at(model, backbone.path).seen
        first = {why: path for path, why in reversed(list(seen.items()))}
        parts += [f"{path}: {why}." for why, path in first.items()]
    parts.append(as_code(backbone.architecture))
    return "\n\n".join(parts)


def as_code(table: Architecture) -> str:
    """The code that registers a role table, without fields that have their default.

    Args:
        table: the role table.
    """
    lines = []
    for field in fields(Architecture):
        value = getattr(table, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            text = pprint.pformat(value, width=100, compact=True, sort_dicts=False)
            lines.append(f"        {field.name}={text},".replace("\n", "\n        "))
    return "\n".join(
        [
            "import hf_visual_peft",
            "",
            "hf_visual_peft.register_architecture(",
            "    hf_visual_peft.Architecture(",
            *lines,
            "    )",
            ")",
        ]
    )


def roles_of(model: nn.Module) -> dict[str, Any]:
    """The same in types of JSON.

    Args:
        model: a backbone, or a model that holds one.

    Raises:
        BackboneError: none can be found.
    """
    backbone = find_backbone(model)
    whole = ("patch_embedding", "input_norms", "between", "between_norms", "final_norms", "heads")
    return {
        "class": backbone.class_name,
        "path": backbone.path,
        "listed": choose(model) is not None,
        **{role: list(getattr(backbone, role)) for role in whole},
        "stream": backbone.architecture.stream,
        "prefix_tokens": backbone.prefix_tokens,
        "grid": backbone.architecture.grid,
        "blocks": [
            {
                "path": block.path,
                "width": block.width,
                "sublayers": list(block.sublayers),
                "roles": {role: list(block.roles[role]) for role in ALL_ROLES if block.roles[role]},
            }
            for block in backbone.blocks
        ],
    }


def places_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Where each method acts on a model with its defaults, or why it cannot, by the method's name.

    Args:
        model: a backbone, or a model that holds one.

    Returns:
        For each method `works` and either `places`, the number of placements by module, or `reason`.

    Raises:
        BackboneError: none can be found.
    """
    backbone = find_backbone(model)
    found: dict[str, dict[str, Any]] = {}
    for name, method in list_methods().items():
        config: Any = method.config_cls()
        try:
            placements = placements_of(config, backbone, backbone)
        except ValueError as error:
            found[name] = {"works": False, "reason": _short(str(error))}
            continue
        places = Counter(_general(placement.path, backbone) for placement in placements)
        found[name] = {"works": True, "places": dict(places)}
    return found


def explain(model: nn.Module) -> str:
    """Where each method acts on a model, or why it cannot.

    Args:
        model: a backbone, or a model that holds one.

    Raises:
        BackboneError: none can be found.
    """
    backbone = find_backbone(model)
    rows = []
    for name, found in places_of(model).items():
        if found["works"]:
            counted = (f"{place} ({count})" if count > 1 else place for place, count in found["places"].items())
            rows.append((name, "yes", ", ".join(counted)))
        else:
            rows.append((name, "no", found["reason"]))
    head = f"{backbone.class_name}: {backbone.depth} blocks. Where each method acts, with its defaults:"
    table = terminal_table(("method", "works", "where, or why not"), rows, whole=("method",))
    return f"{head}\n\n{table}"


def _outside(backbone: VisionBackbone) -> Iterator[tuple[str, str]]:
    table = backbone.architecture
    for role in ("patch_embedding", "input_norms", "between", "between_norms", "final_norms", "heads"):
        yield role.replace("_", " "), _listed(getattr(backbone, role))
    yield "stream", table.stream
    yield "tokens before the patches", str(backbone.prefix_tokens)
    yield "how tokens lie in the image", table.grid or "not known"


def _inside(block: Block) -> Iterator[tuple[str, str]]:
    for role in ALL_ROLES:
        if block.roles[role]:
            yield role, _listed([path.removeprefix(f"{block.path}.") for path in block.roles[role]])
    yield "adds to the stream", ", ".join(block.sublayers) or "nothing that methods could stand at"
    yield "norms", "after the sub-layers" if block.post_norm else "before the sub-layers"
    yield "width", str(block.width)
    if block.table is not None:
        yield "softmax attention", "yes" if block.table.softmax else "no"
        joining = {"sequence": "in the sequence", "keys": "as keys and values", None: "no"}
        yield "prompts join", joining[block.table.prompts]


def _kinds(model: nn.Module, backbone: VisionBackbone) -> list[tuple[Block, int]]:
    """The first of the blocks with the same roles, and their number."""
    kinds: dict[Any, list[Block]] = {}
    for block in backbone.blocks:
        roles = tuple((r, tuple(p.removeprefix(block.path) for p in block.roles[r])) for r in ALL_ROLES)
        kinds.setdefault((type(model.get_submodule(block.path)), roles, block.sublayers), []).append(block)
    return [(blocks[0], len(blocks)) for blocks in kinds.values()]


def _general(path: str, backbone: VisionBackbone) -> str:
    """A module's name without the number of its block."""
    for block in backbone.blocks:
        if path == block.path:
            return "each block"
        if path.startswith(f"{block.path}."):
            return path.removeprefix(f"{block.path}.")
    return path or "the model"


def _listed(paths: Any) -> str:
    shown = ", ".join(list(paths)[:4])
    return (shown if len(paths) <= 4 else f"{shown} and {len(paths) - 4} more") or "none"


def _short(text: str) -> str:
    return text.partition(" Methods that work on it:")[0].splitlines()[0][:200]
