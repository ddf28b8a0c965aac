"""What test_distributed.py starts on two processes: adapters under DistributedDataParallel and FSDP2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from families import FAMILIES
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hf_visual_peft


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from checkpoints import load_trainable, saved_state, trainable_state


IMAGES = 8
ADAPTERS = {
    "vpt_deep": ("vpt", {"num_virtual_tokens": 2}),
    "vpt_shallow": ("vpt", {"num_virtual_tokens": 2, "deep": False}),
    "adaptformer": ("adaptformer", {"r": 4, "dropout": 0.0}),
    "colin": ("colin", {"r": 6, "rank": 3, "orthogonality": 0.01}),  # with an auxiliary loss
    "convpass": ("convpass", {"r": 4, "dropout": 0.0}),
    "mosa": ("mosa", {"r": 4, "dropout": 0.0}),
    "ssf": ("ssf", {}),
    "fact_tt": ("fact", {"r": 4, "dropout": 0.0, "variant": "tt"}),
    "fact_tk": ("fact", {"r": 4, "dropout": 0.0, "variant": "tk"}),
    "gps": ("gps", {}),
    "linearprobe": ("linearprobe", {}),
}
ONE_UNIT = ("arc", "efft", "fact", "kadaptation")  # weights that lie in one block and act in others


def batch() -> dict[str, Tensor]:
    """Images and labels for all processes together."""
    return FAMILIES["vit"].inputs(IMAGES) | {"labels": torch.arange(IMAGES) % 3}


def build(name: str) -> PeftModel:
    """The adapter on a tiny ViT, its weights moved off their initial values; the same in every process."""
    method, fields = ADAPTERS[name]
    torch.manual_seed(3)
    config = hf_visual_peft.get_method(method).config_cls(**fields, init_weights=False)
    model = get_peft_model(FAMILIES["vit"].model(), config)
    if hf_visual_peft.get_method(method).calibrated:
        hf_visual_peft.calibrate(model, [batch()], progress=False)
    return model.train()


def loss_of(model: nn.Module, part: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(4)  # MoSA draws at every call
    return model(**part).loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of what trains; missing where there is none."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def sharded(name: str, part: dict[str, Tensor], folder: Path, rank: int) -> dict[str, Tensor]:
    """Gradients under FSDP2; the adapter is saved and put back as the recipe does."""
    model = build(name)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    blocks = [module for module in model.modules() if type(module).__name__ == "ViTLayer"]
    assert len(blocks) == 3
    for block in [] if ADAPTERS[name][0] in ONE_UNIT else blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_of(model, part).backward()

    kept = trainable_state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_trainable(model, kept, "what was kept")
    state = saved_state(model)
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {key for key, tensor in state.items() if isinstance(tensor, DTensor)} == frozen & state.keys() != set()
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    return {key: gradient.full_tensor() for key, gradient in gradients(model).items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # the default, written out: DistributedDataParallel then fails at the next step where a parameter got no gradient
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)])
    ranks, rank = accelerator.num_processes, accelerator.process_index
    mine = {key: value.chunk(ranks)[rank] for key, value in batch().items()}
    found: dict[str, Tensor] = {}
    for name in ADAPTERS:
        model = build(name)
        wrapped = accelerator.prepare(model)
        for kind, steps in (("whole", 1), ("again", 1), ("accumulated", 2)):
            accelerator.gradient_accumulation_steps = steps
            model.zero_grad()
            for index in range(steps):
                part = {key: value.chunk(steps)[index] for key, value in mine.items()}
                with accelerator.accumulate(wrapped):
                    assert wrapped.require_backward_grad_sync == (index == steps - 1)
                    accelerator.backward(loss_of(wrapped, part))
            found |= {f"{name}/{kind}/{key}": value for key, value in gradients(model).items()}
        accelerator.free_memory(wrapped)
        found |= {f"{name}/sharded/{key}": value for key, value in sharded(name, mine, folder / name, rank).items()}
    save_file(found, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps({"processes": ranks, "type": str(accelerator.distributed_type)}))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
