"""Writes the picture in README: what the methods gain over a linear probe, by how many numbers they train.

    python docs/site/overview.py

Accuracies are those of docs/defaults.md, counts those of the registry.
"""

import json
import re
from pathlib import Path

import torch
import vl_convert
from peft import PeftConfig, get_peft_model
from transformers import ViTConfig, ViTModel

from hf_visual_peft import get_method


DOCS = Path(__file__).resolve().parents[1]
SETS = ("digits", "emoji", "textile")
# the points that have room for their name
NAMED = (
    *("adaptformer", "adapterplus", "bilora", "bitfit", "convpass", "fact", "hst", "kadaptation", "lst"),
    *("partial", "restuning", "sharedlora", "sidetuning", "ssf", "vpt", "dtl", "vitadapter"),
)


def gains() -> list[dict[str, object]]:
    """Methods that are measured on all sets: their mean accuracy less that of the probe, and their count."""
    rows = re.findall(
        r"^\| (\w+) +\|[^|]*\| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \|$", (DOCS / "defaults.md").read_text(), re.M
    )
    means = {name: sum(map(float, figures)) / len(SETS) for name, *figures in rows}
    found = []
    for name, mean in means.items():
        if name == "linearprobe":
            continue
        try:
            method = get_method(name)
        except ValueError:  # of peft
            continue
        if count := method.counts[0][1] if method.calibrated else trained(method.config_cls()):
            gain = round(mean - means["linearprobe"], 2)
            found.append({"method": name, "branch": method.category, "gain": gain, "parameters": count})
    return found


def trained(config: PeftConfig) -> int:
    """How many numbers a method trains on ViT-B/16, without the head."""
    config.modules_to_save = []
    with torch.device("meta"):
        model = get_peft_model(ViTModel(ViTConfig(), add_pooling_layer=False), config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def chart(rows: list[dict[str, object]]) -> dict[str, object]:
    """The picture in the grammar of Vega-Lite."""
    x = {
        "field": "parameters",
        "type": "quantitative",
        "scale": {"type": "log"},
        "title": "trained numbers on ViT-B/16, without the head",
        "axis": {"format": "~s", "grid": False, "tickCount": 4},
    }
    y = {
        "field": "gain",
        "type": "quantitative",
        "title": "accuracy over a linear probe, in points",
        "scale": {"domainMin": -2, "clamp": True},
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 640,
        "height": 300,
        "background": "white",
        "data": {"values": rows},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "mark": {"type": "point", "filled": True, "size": 60},
                "encoding": {"color": {"field": "branch", "title": None, "legend": {"labelLimit": 200}}},
            },
            {
                "transform": [{"filter": {"field": "method", "oneOf": list(NAMED)}}],
                "mark": {"type": "text", "dy": -9, "fontSize": 10},
                "encoding": {"text": {"field": "method"}},
            },
        ],
    }


if __name__ == "__main__":
    target = DOCS / "assets" / "overview.svg"
    target.write_text(vl_convert.vegalite_to_svg(json.dumps(chart(gains()))), encoding="utf-8")
    print(target)
