"""A picture of a transformer with the places marked at which a method acts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import schemdraw
from schemdraw import elements as elm
from schemdraw import flow

from hf_visual_peft.backbones.backbone import VisionBackbone
from hf_visual_peft.sites import Placement


INK, MARK = "#010203", "#040506"  # stand for the colours of the page, by names that the library does not know
# the boxes of a block, in the order of its forward pass, and the roles of the modules that each stands for
BLOCK = {
    "norm": ("norm1",),
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "softmax": (),
    "output": ("output",),
    "norm ": ("norm2",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
}
SUBLAYERS = {"attention": "attention sub-layer", "mlp": "MLP"}


def marked(placements: Iterable[Placement], backbone: VisionBackbone) -> set[str]:
    """The boxes and ways of the picture at which a method acts.

    Args:
        placements: of the method.
        backbone: that they are for.
    """
    by_path = dict.fromkeys(backbone.patch_embedding, "patch embedding")
    by_path |= dict.fromkeys(backbone.final_norms, "final norm") | dict.fromkeys(backbone.heads, "head")
    for block in backbone.blocks:
        by_path |= {path: box for box, roles in BLOCK.items() for role in roles for path in block.roles[role]}
        by_path[block.path] = "block"
    found = set()
    for placement in placements:
        kind = type(placement.site).__name__
        if kind == "PixelSite":
            found.add("image")
        elif kind == "HeadSite":
            found.add("head")
        elif kind == "SideSite":
            found.add("side network")
        elif kind in ("TokenSite", "KeyValueSite", "QuerySite"):
            found.add("tokens" if kind == "TokenSite" else "softmax")
        elif kind == "LogitSite":
            found.add("softmax")
        elif placement.site.at:
            found.add(SUBLAYERS[placement.site.at])
        else:
            found.add(by_path.get(placement.path, "block"))
    return found


def picture(placements: Iterable[Placement], backbone: VisionBackbone) -> str:
    """The picture as SVG, in the colours of the page.

    Args:
        placements: of the method.
        backbone: that they are for.
    """
    places = marked(placements, backbone)
    schemdraw.use("svg")
    drawing = schemdraw.Drawing(show=False, transparent=True, color=INK, fontsize=12)

    def style(name: str) -> dict[str, Any]:
        return {"color": MARK, "lw": 3.5} if name in places else {"color": INK, "lw": 1.2}

    def box(name: str, x: float, y: float, width: float, height: float = 0.9) -> elm.Element:
        shape = flow.Box(w=width, h=height, **style(name)).at((x, y)).anchor("W")
        return drawing.add(shape.label(name.strip(), fontsize=11, color=INK))

    def frame(name: str, left: float, right: float, half: float, label: str) -> None:
        drawing.add(elm.Rect(corner1=(left, -half), corner2=(right, half), **style(name)))
        drawing.add(elm.Label().at((left + 0.1, half + 0.12)).label(label, halign="left", fontsize=11))

    def flow_through(*boxes: elm.Element) -> None:
        for before, after in pairwise(boxes):
            drawing.add(elm.Arrow(arrowwidth=0.15, arrowlength=0.2, color=INK, lw=1.2).at(before.E).to(after.W))

    image, patches, tokens = box("image", 0, 0, 1.5), box("patch embedding", 2, 0, 2.9), box("tokens", 5.4, 0, 1.6)
    frame("block", 7.6, 22.5, 3.1, f"block, {backbone.depth} times")
    frame("attention sub-layer", 8.1, 16.4, 2.2, "attention")
    frame("MLP", 16.9, 22.1, 2.2, "MLP")
    norm = box("norm", 8.4, 0, 1.3)
    linears = [box(name, 10.4, y, 1.4, 0.8) for name, y in (("query", 1.3), ("key", 0), ("value", -1.3))]
    attention, output = box("softmax", 12.5, 0, 1.6), box("output", 14.6, 0, 1.5)
    norm2, up, down = box("norm ", 17.2, 0, 1.3), box("fc1", 19, 0, 1.1), box("fc2", 20.7, 0, 1.1)
    final, head = box("final norm", 23, 0, 1.9), box("head", 25.4, 0, 1.2)
    flow_through(image, patches, tokens, norm)
    for linear in linears:
        flow_through(norm, linear, attention)
    flow_through(attention, output, norm2, up, down, final, head)
    if "side network" in places:
        side = flow.Box(w=14.9, h=0.9, **style("side network")).at((7.6, -4.2)).anchor("W")
        drawing.add(side.label("side network", fontsize=11, color=INK))
        for x in (10, 15, 20):
            drawing.add(elm.Arrow(arrowwidth=0.15, arrowlength=0.2, color=MARK, lw=1.2).at((x, -3.1)).to((x, -3.75)))
    svg = drawing.get_imagedata("svg").decode()
    svg = svg.replace(INK, "currentColor").replace(MARK, "var(--md-accent-fg-color)")
    return re.sub(r'(<svg[^>]*?) height="[^"]*" width="[^"]*"', r'\1 width="100%" role="img"', svg, count=1)
