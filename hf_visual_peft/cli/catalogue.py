"""The registered methods as a table, as JSON and as a page of the documentation."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..backbones.backbone import BLOCK_ROLES, VisionBackbone
from ..core.registry import Method, Paper, list_methods
from ..core.targets import TargetedConfig, default_of, own_fields
from ..language.config import list_language_methods
from ..peft_methods.methods import PEFT_METHODS, PeftMethod
from ..sites import Placement
from ..tables import close_names, did_you_mean, format_table, listed, terminal_table
from .not_built import not_built


_GRADIENTS = {
    "full": "through the backbone",
    "partial": "through a part of the backbone",
    "none": "not through the backbone",
}
_ACTIVATIONS = {"full": "whole backbone", "partial": "a part", "none": "none"}
_SUBLAYERS = {"attention": "attention", "mlp": "the MLP"}
_BLOCK = "the block"
_ROLES = {role: role for role in BLOCK_ROLES} | {"output": "the output projection"}
_LINEARS = ("query", "key", "value", "the output projection", "fc1", "fc2")
_INTRODUCTION = """\
# Methods

Written by `make docs` from the declarations of the methods (`hf-visual-peft methods --markdown`).

*Category* is the branch in "Parameter-Efficient Fine-Tuning for Pre-Trained Vision Models"
([arXiv 2402.02242](https://arxiv.org/abs/2402.02242)), *visual tuning* that in "Visual Tuning"
([arXiv 2305.06061](https://arxiv.org/abs/2305.06061)). *Parameters* train on ViT-B/16 at 224 px, the head not counted;
the tests count them. *Activations* are those of the backbone that training keeps for the backward pass: of the whole
backbone, of a part of it, or none. A method that *merges* folds into the weights of the backbone; one that is the
*identity* changes no output before it is trained. Sites are those on ViT-B/16 with the config's defaults.
"""


def methods_table() -> str:
    """All methods for a terminal: by branch of the survey, then those for class names and those of peft."""
    header = ("method", "what it does", "on ViT-B/16", "merges")
    branches: dict[str, list[tuple[str, ...]]] = {}
    for method in list_methods().values():
        row = (method.name, method.summary, f"{method.counts[0][1]:,}", _yes(method.mergeable))
        branches.setdefault(method.category.capitalize(), []).append(row)
    parts = [
        f"{branch}\n\n{terminal_table(header, rows, right=header[2:3], whole=header[:1])}"
        for branch, rows in sorted(branches.items())
    ]
    of_peft = [
        (method.name, f"{method.config_cls.__name__}{_chosen(method)} on {method.acts_on}", _yes(method.mergeable))
        for method in PEFT_METHODS.values()
    ]
    named = [
        (method.name, method.paper.title, f"{method.counts[0][2]:,}" if method.counts else "")
        for method in list_language_methods().values()
    ]
    return "\n\n".join(
        [
            *parts,
            "Classifiers of class names (CLIP and the like)\n",
            terminal_table(("method", "paper", "on ViT-B/16"), named, right=("on ViT-B/16",), whole=("method",)),
            "Methods of peft\n",
            terminal_table(("method", "what it does", "merges"), of_peft, whole=("method",)),
            "Numbers: trained parameters, without the head.\nOne method whole: `hf-visual-peft methods NAME`.",
        ]
    )


def describe_method(name: str) -> str:
    """One method whole, as Markdown.

    Args:
        name: of a method of this library, for class names, or of peft.

    Raises:
        ValueError: no such method; the message has the close names.
    """
    word = name.lower().removesuffix("config")
    if word in (ours := list_methods()):
        return _section(ours[word], vit_b16())
    if word in (named := list_language_methods()):
        method = named[word]
        items = [
            f"Paper: {_link(method.paper)}, {method.paper.venue}",
            f"Equation: `{method.equation}`",
            f"Fields: {_fields(method.config_cls)}",
            *(
                f"Parameters on CLIP ViT-B/16: {count:,} ({_setting(setting)}; {classes} classes)"
                for setting, classes, count in method.counts
            ),
            "For a `ZeroShotClassifier`",
        ]
        return _entry(method.config_cls, items)
    if word in PEFT_METHODS:
        of_peft = PEFT_METHODS[word]
        items = [
            f"Config: `{of_peft.config_cls.__name__}{_chosen(of_peft)}` of peft",
            f"Acts on: {of_peft.acts_on}",
            f"Convolutions: {_yes(of_peft.convolutional)}. Merges: {_yes(of_peft.mergeable)}",
            f"AdamW: learning rate {of_peft.training.learning_rate:g} by default (defaults.md)",
        ]
        return "\n".join([f"## {of_peft.name}", "", *(f"- {item}" for item in items)])
    known = [*ours, *named, *PEFT_METHODS]
    hint = did_you_mean(close_names(word, known)) or "`hf-visual-peft methods` lists them."
    raise ValueError(f"Unknown method {name!r}. {hint}")


def methods_json() -> str:
    """The methods of this library for scripts, with all that is declared."""
    return json.dumps([as_dictionary(method) for method in list_methods().values()], indent=2)


def as_dictionary(method: Method) -> dict[str, Any]:
    """What is declared of a method, in types of JSON."""
    return {
        "name": method.name,
        "config": method.config_cls.__name__,
        "summary": method.summary,
        "category": method.category,
        "visual_tuning": method.visual_tuning,
        "paper": {
            "title": method.paper.title,
            "venue": method.paper.venue,
            "arxiv": method.paper.arxiv,
            "url": method.paper.url,
        },
        "equation": method.equation,
        "trainable_on_vit_b16": [{"fields": setting, "parameters": count} for setting, count in method.counts],
        "further_head_inputs": method.head_inputs,
        "mergeable": method.mergeable,
        "gradients_through_backbone": method.gradients,
        "identity_at_start": method.identity_at_start,
        "training": asdict(method.training),
        "calibrated": method.calibrated,
        "video": method.video,
    }


def methods_markdown() -> str:
    """The page `docs/methods.md`: an overview by category, and a section for each method."""
    methods = sorted(list_methods().values(), key=lambda method: (method.category, method.name))
    backbone = vit_b16()
    header = (
        *("config", "category", "what it does", "paper"),
        *("parameters", "with", "merges", "identity", "activations", "chooses from data"),
    )
    rows = []
    for method in methods:
        setting, count = method.counts[0]
        config = method.config_cls.__name__
        rows.append(
            (
                f"[{config}](#{config.lower()})",
                method.category,
                method.summary,
                f"[{_source(method.paper) if method.paper.arxiv else method.paper.venue}]({method.paper.url})",
                _count(method, count),
                _setting(setting),
                _yes(method.mergeable),
                _yes(method.identity_at_start),
                _ACTIVATIONS[method.gradients],
                _yes(method.calibrated),
            )
        )
    sections = (_section(method, backbone) for method in methods)
    return "\n".join(
        [_INTRODUCTION, format_table(header, rows, right=("parameters",)), "", *sections, not_built()]
    ).rstrip()


def _section(method: Method, backbone: VisionBackbone) -> str:
    counts = "; ".join(f"{count:,} ({_setting(setting)})" for setting, count in method.counts)
    if method.head_inputs:
        counts += f", and {method.head_inputs:,} extra inputs of the head for each class"
    items = [
        f"Paper: {_link(method.paper)}, {method.paper.venue}",
        f"Category: {method.category}; visual tuning: {method.visual_tuning}",
        f"Equation: `{method.equation}`",
        f"Sites: {describe_sites(method.config_cls().placements(backbone), backbone)}",
        f"Fields: {_fields(method.config_cls)}",
        f"Parameters: {counts}",
        f"Merges: {_yes(method.mergeable)}. Identity at the start: {_yes(method.identity_at_start)}. "
        f"Activations: {_ACTIVATIONS[method.gradients]}",
        f"AdamW: learning rate {method.training.learning_rate:g} by default (defaults.md)",
    ]
    if issubclass(method.config_cls, TargetedConfig):
        items.append(f"Explicit `target_modules`: {method.config_cls.valid_targets}")
    if method.calibrated:
        items.append("Chooses from data: `hf_visual_peft.calibrate(model, dataloader)` before training")
    if method.video:
        items.append("Videos: `pixel_values` of (batch, frames, channels, height, width)")
    return _entry(method.config_cls, items)


def _entry(config_cls: type, items: Iterable[str]) -> str:
    """A section on a method: what its docstring tells, and a list of facts."""
    paragraphs = inspect.cleandoc(config_cls.__doc__ or "").split("\n\n")
    about = "" if len(paragraphs) < 2 or paragraphs[1].startswith("Args:") else f"{paragraphs[1]}\n\n"
    listing = "\n".join(f"- {item}" for item in items)
    return f"## {config_cls.__name__}\n\n{about}{listing}\n"


def _fields(config_cls: Any) -> str:
    """The fields that only this config has, with their defaults."""
    return (
        ", ".join(f"`{field.name}` ({default_of(field)!r})" for field in own_fields(config_cls)) or "none of its own"
    )


def _chosen(method: PeftMethod) -> str:
    """The fields that make a variant of a method of peft, as in a call."""
    return f"({_setting(method.chosen)})" if method.chosen else ""


def describe_sites(placements: Iterable[Placement], backbone: VisionBackbone) -> str:
    """The places of a method's equations, in words.

    Args:
        placements: of the method.
        backbone: that they are for.
    """
    placed = list(placements)
    names = _names(backbone)
    kinds: dict[str, list[Placement]] = {}
    for placement in placed:
        kinds.setdefault(placement.site.describe(names), []).append(placement)
    parts = []
    for kind, members in kinds.items():
        sublayers = [_SUBLAYERS[m.site.at] for m in members if m.site.at]
        found = set(sublayers) or {names[member.path] for member in members}
        words = _collapse([name for name in dict.fromkeys((*sublayers, *names.values())) if name in found])
        where = _blocks(members, backbone)
        if where and _BLOCK in words and "{}" in kind:
            words[words.index(_BLOCK)] = where
        elif where:
            kind += f", in {where}"
        parts.append(kind.format(listed(words)))
    return "; ".join([*parts, *_shared(placed, backbone)])


def _names(backbone: VisionBackbone) -> dict[str, str]:
    """The names of the modules, by their path, in the order of a forward pass."""
    names = {backbone.path: "the backbone"} | dict.fromkeys(backbone.patch_embedding, "the patch embedding")
    names |= dict.fromkeys(backbone.input_norms, "the norm before the blocks")
    for block in backbone.blocks:
        names[block.path] = _BLOCK
        names |= {path: _ROLES[role] for role in BLOCK_ROLES for path in block.roles[role]}
    return names | dict.fromkeys(backbone.final_norms, "the final norm") | dict.fromkeys(backbone.heads, "the head")


def _index(placement: Placement, backbone: VisionBackbone) -> int | None:
    """The block of a placement."""
    inside = (b.index for b in backbone.blocks if f"{placement.path}.".startswith(f"{b.path}."))
    return next(inside, None)


def _blocks(placements: Sequence[Placement], backbone: VisionBackbone) -> str:
    """The blocks, if not all."""
    found = {index for placement in placements if (index := _index(placement, backbone)) is not None}
    if len(found) in (0, backbone.depth):
        return ""
    if found == {backbone.depth - 1}:
        return "the last block"
    return f"{'block' if len(found) == 1 else 'blocks'} {listed([str(index) for index in sorted(found)])}"


def _collapse(names: list[str]) -> list[str]:
    """Replace all linears of a block by one entry."""
    if not set(_LINEARS) <= set(names):
        return names
    last = max(names.index(linear) for linear in _LINEARS)
    every = [*names[:last], "every linear of the blocks", *names[last + 1 :]]
    return [name for name in every if name not in _LINEARS]


def _shared(placements: Iterable[Placement], backbone: VisionBackbone) -> list[str]:
    """The parts that equations share, among all blocks or within each."""
    users: dict[str, set[int | None]] = {}
    for placement in placements:
        if placement.shared is not None:
            users.setdefault(placement.shared.name, set()).add(_index(placement, backbone))
    across = [name for name, blocks in users.items() if len(blocks) > 1]
    within = dict.fromkeys(re.sub(r"\d+$", "", name) for name in users if name not in across)
    return [
        *([f"{listed([f'`{name}`' for name in across])} shared by all blocks"] if across else []),
        *([f"{listed([f'`{name}`' for name in within])} shared within each block"] if within else []),
    ]


def vit_b16() -> VisionBackbone:
    """The backbone that counts and places are told for."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from ..backbones.finding import find_backbone

    with torch.device("meta"):
        return find_backbone(ViTForImageClassification(ViTConfig()))


def _count(method: Method, count: int) -> str:
    """Parameters without the head, and the extra ones of the head per class."""
    return f"{count:,}" + (f" + {method.head_inputs:,} a class" if method.head_inputs else "")


def _source(paper: Paper) -> str:
    return f"arXiv {paper.arxiv}" if paper.arxiv else paper.url


def _link(paper: Paper) -> str:
    return f"[{paper.title}]({paper.url})"


def _setting(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items()) or "defaults"


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
