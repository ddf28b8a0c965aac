"""What test_language_methods.py starts on two processes: gradients of methods for class texts under DDP."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from dual_encoders import classifier, images
from peft import get_peft_model
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import hf_visual_peft


CONFIGS = {
    "kgcoop": hf_visual_peft.KgCoOpConfig(init_text="abc"),
    "cocoop": hf_visual_peft.CoCoOpConfig(init_text="ab"),
    "promptsrc": hf_visual_peft.PromptSRCConfig(init_text=None),
    "taskres": hf_visual_peft.TaskResConfig(),
    "two_sfs": hf_visual_peft.TwoSFSConfig(),
    "flyp": hf_visual_peft.FLYPConfig(),  # its loss compares the images of all processes
}


def gradients(folder: str, name: str, part: slice, wrap: bool) -> dict[str, torch.Tensor]:
    """The gradients of a step on a part of the batch; with several parts of the classes, computed again."""
    torch.manual_seed(0)
    base = classifier(folder, class_chunk=3)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, CONFIGS[name]).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    run = DistributedDataParallel(model) if wrap else model
    pixels, labels = images("clip", 4)["pixel_values"], torch.arange(4)
    run(pixel_values=pixels[part], labels=labels[part]).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    """Save the gradients that the first of two processes has."""
    folder, output, address, rank = *sys.argv[1:4], int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    for name in CONFIGS:
        found = gradients(folder, name, slice(2 * rank, 2 * rank + 2), wrap=True)
        if rank == 0:
            save_file(found, f"{output}/{name}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
