"""What the tests of networks beside a backbone share."""

import torch
from transformers import ViTConfig, ViTForImageClassification


def vit(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 32, "patch_size": 8, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**sizes | kwargs))


def kept(model, inputs):
    """Channels and size of the activations that a training step keeps, each once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # the dictionary holds on to them
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs).logits
    assert output.requires_grad
    return sorted((t.shape[-1], t.numel()) for pointer, t in found.items() if pointer not in own)
