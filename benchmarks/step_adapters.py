"""The bottleneck adapter of the `adapters` library, measured in an environment that has it.

    python benchmarks/step_adapters.py vit_s '{"threads": 2, "rounds": 15}'

`adapters` needs an older transformers than the methods do, so nothing of these is imported here. Called by `step.py`
with `--adapters_python`; prints one line of JSON, whose ratios are to the floors in that environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import SeqBnConfig
from step_rounds import (
    ACTIVATIONS,
    FORWARD,
    MODELS,
    Contestant,
    Setup,
    build_model,
    example,
    floors,
    infer_once,
    kept_bytes,
    median_ms,
    ratio,
    take_turns,
    train_once,
)


R = 8  # width of the bottleneck, as of Pfeiffer's


def adapted(model_name: str, device: str) -> Any:
    """A model with a bottleneck after the MLP of every block, which trains with the head."""
    model: Any = build_model(model_name)
    adapters.init(model)
    config = SeqBnConfig(reduction_factor=MODELS[model_name]["hidden_size"] / R)
    for name in ("default", "second"):
        model.add_adapter(name, config=config)
    model.train_adapter("default")
    model.get_submodule("classifier").requires_grad_(True)
    return model.to(device)


def measure(model_name: str, setup: Setup) -> dict[str, Any]:
    """The fields of a result, but for the names."""
    torch.set_num_threads(setup.threads)
    inputs = example(setup.batch, device=setup.device)
    both = floors(model_name, setup.device)
    model = adapted(model_name, setup.device)
    ours = Contestant("adapters", model.train())
    turns = take_turns([*both, ours], train_once, inputs, setup.rounds)
    kept = kept_bytes(ours, inputs)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder, "default")
        size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.suffix in (".bin", ".safetensors"))
        load = median_ms(lambda: model.load_adapter(folder, load_as="third"), lambda: model.delete_adapter("third"))
    switch = median_ms(lambda: model.train_adapter("second"), lambda: model.train_adapter("default"), times=15)
    model.eval()
    inference = take_turns([both[0], ours], infer_once, inputs, setup.rounds)
    return {
        "setup": asdict(setup),
        "setting": {"config": "seq_bn", "r": R, "adapters": adapters.__version__},
        "parameters": trained,
        "seconds": sorted(turn.step for turn in turns[ACTIVATIONS])[setup.rounds // 2],
        "step": ratio(turns, "adapters", ACTIVATIONS),
        "step_to_forward": ratio(turns, "adapters", FORWARD),
        "optimizer": ratio(turns, "adapters", ACTIVATIONS, "optimizer"),
        "kept": kept,
        "inference": ratio(inference, "adapters", FORWARD),
        "adapter_bytes": size,
        "load_ms": load,
        "switch_ms": switch,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Setup(**json.loads(sys.argv[2])))))
