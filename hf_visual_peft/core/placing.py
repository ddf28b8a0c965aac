"""Places the equations of a method in a backbone, stage by stage, or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peft.utils.other import match_target_against_key

from ..backbones.backbone import BackboneError, NoTokensError, VisionBackbone
from ..sites import Placement
from ..sites.site import why_not_packed
from .config import VisualPeftConfig
from .parts import Part, check_order
from .registry import list_methods


def placements_of(config: VisualPeftConfig, selected: VisionBackbone, whole: VisionBackbone) -> list[Placement]:
    """The equations of a method and their places.

    A method sees one stage at a time: blocks of one width. Its equations share parts only within a stage. Branches at
    a sub-layer that a block lacks are left out, and so are tokens that would join an attention that pools.

    Args:
        config: of the method.
        selected: the backbone, with only the blocks to adapt.
        whole: the whole backbone.

    Raises:
        NoTokensError: the method needs a stream of tokens and the backbone has none; the message names those that
            work there.
        BackboneError: the backbone has none of the modules that the method acts on.
        ValueError: a field does not fit the backbone, or the method does not.
    """
    try:
        if whole.tower == "text":
            _require_texts(config, whole)
        placements = _all_placements(config, selected, whole)
    except NoTokensError as error:
        raise NoTokensError(f"{config.title}: {error} {_advice(config, whole)}") from error
    if not placements and len(selected.blocks) < len(whole.blocks):
        raise ValueError(
            f"{config.title}.exclude_modules is {config.exclude_modules!r}, layers_to_transform "
            f"{config.layers!r}: in the remaining blocks, the method has nothing to act on."
        )
    if not placements:
        raise BackboneError(
            f"{config.title}: {whole.class_name} has none of the modules that it acts on. {_advice(config, whole)}"
        )
    return placements


def _require_texts(config: VisualPeftConfig, whole: VisionBackbone) -> None:
    """Refuse a method that is made for images or videos.

    Raises:
        ValueError: it is.
    """
    reason = (
        "it takes videos"
        if config.video
        else "it trains the head alone, which no text tower has"
        if config.copied_head
        else "it chooses from labelled images what to train"
        if config.chooses_from_data
        else "its loss is that of images"
        if config.has_auxiliary_loss
        else ""
    )
    if reason:
        raise ValueError(f"{config.title} does not fit {whole.class_name}: {reason}.")


def _all_placements(config: VisualPeftConfig, selected: VisionBackbone, whole: VisionBackbone) -> list[Placement]:
    parts = config.adapter_parts()
    if parts:
        placed = [(part, each) for part in parts for each in _placements_of_part(config, part, selected, whole)]
        check_order(config, placed)
        return [placement for _, placement in placed]
    placements = list(_placements(config, selected, whole))
    name = config.title
    field = "exclude_modules" if config.layers is None else "layers_to_transform"
    for kind in dict.fromkeys(type(placement.site) for placement in placements):
        placements = kind.arrange(placements, whole, name, f"{name}.{field} is {getattr(config, field)!r}")
    return placements


def _placements_of_part(
    config: VisualPeftConfig, part: Part, selected: VisionBackbone, whole: VisionBackbone
) -> Iterator[Placement]:
    check_layers(part.config, whole)
    chosen = selected.select(part.config.layers)
    blocks = tuple(block for block in chosen.blocks if not is_excluded(part.config, block.path))
    if not blocks:
        raise ValueError(
            f"{config.title}: the part {part.label} has no block to act on, as its layers_to_transform is "
            f"{part.config.layers!r} and its exclude_modules {part.config.exclude_modules!r}, and the whole adapter's "
            f"are {config.layers!r} and {config.exclude_modules!r}."
        )
    for placement in placements_of(part.config, replace(chosen, blocks=blocks), whole):
        passage = placement.site.passes_on and placement.build is None
        if passage or not is_excluded(part.config, placement.path):
            yield part.renamed(placement)


def check_layers(config: VisualPeftConfig, backbone: VisionBackbone) -> None:
    """Refuse indices of blocks that the backbone does not have.

    Args:
        config: of the method.
        backbone: the whole backbone.

    Raises:
        ValueError: there is one.
    """
    for layer in config.layers or ():
        if layer >= backbone.depth:
            known = f"{backbone.class_name} has {backbone.depth} blocks, 0 to {backbone.depth - 1}."
            if layer < backbone.depth + backbone.unread:
                known = f"the model around {backbone.class_name} does not read it, but 0 to {backbone.depth - 1} only."
            raise ValueError(f"{config.title}.layers_to_transform has {layer}: {known}")


def is_excluded(config: VisualPeftConfig, path: str) -> bool:
    """Whether the config excludes a module, or a module around it.

    Args:
        config: of the method.
        path: full name of the module.
    """
    names = config.exclude_modules
    if not names:
        return False
    parts = path.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    if isinstance(names, str):
        return any(match_target_against_key(names, each) for each in around)
    return any(each == name or each.endswith(f".{name}") for name in names for each in around)


def _advice(config: VisualPeftConfig, whole: VisionBackbone) -> str:
    names = []
    for name, method in list_methods().items():
        try:
            other = method.config_cls()
            # all blocks: the last one may also refuse; the parts of an adapter are listed by themselves
            found = type(other) is not type(config) and not other.adapter_parts()
            found = found and bool(_all_placements(other, whole, whole))
        except ValueError:
            continue
        if found:
            names.append(name)
    return f"Methods that work on it: {', '.join(names)}."


def _placements(config: VisualPeftConfig, selected: VisionBackbone, whole: VisionBackbone) -> Iterator[Placement]:
    blocks = {block.path: block for block in selected.blocks}
    for stage in selected.stages(whole) if config.per_stage else (selected,):
        for placement in config.placements(stage):
            site, block = placement.site, blocks.get(placement.path)
            if block is not None and not site.exists_at(block, whole):
                continue
            of_texts = site.why_no_text() if whole.tower == "text" else None
            if why := of_texts or why_not_packed(site, block, whole) or site.why_not(block, whole):
                raise ValueError(f"{config.title} does not fit {whole.class_name}{why}")
            if placement.shared is not None and whole.tower == "text":  # its widths are not those of images
                placement = replace(placement, shared=replace(placement.shared, name=f"text_{placement.shared.name}"))
            if placement.shared is not None and stage.stage is not None:
                shared = replace(placement.shared, name=f"{placement.shared.name}_stage{stage.stage}")
                placement = replace(placement, shared=shared)
            yield placement
