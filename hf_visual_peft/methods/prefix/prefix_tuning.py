"""Prefix tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from ...backbones.backbone import Block, VisionBackbone
from ...core.config import VisualPeftConfig
from ...core.registry import Paper, register
from ...sites import (
    KeyValueSite,
    Placement,
    Shared,
    VisualTunerLayer,
    attention_path,
    head_sizes,
    projections,
)
from ...training.defaults import Training
from ..prompt.vpt import MAX_VIRTUAL_TOKENS


class Prefixes(nn.Module):
    """Learned keys and values of one block, the same for every image.

        K' = [K; dropout(P_k)],  V' = [V; dropout(P_v)],  P ~ U(-v, v), v = sqrt(6 / ((tokens + 1) channels of P))

    Args:
        num_virtual_tokens: how many keys, and as many values.
        heads: of the attention's keys.
        key_width: channels of a head in keys.
        value_width: channels of a head in values.
        dropout: probability, for each element of each image.
    """

    def __init__(self, num_virtual_tokens: int, heads: int, key_width: int, value_width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.keys = nn.Parameter(_drawn(num_virtual_tokens, heads * key_width))
        self.values = nn.Parameter(_drawn(num_virtual_tokens, heads * value_width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, num_virtual_tokens, channels of a head) each."""
        return _heads(self.keys, batch_size, self), _heads(self.values, batch_size, self)


def _drawn(tokens: int, width: int) -> Tensor:
    bound = math.sqrt(6.0 / ((tokens + 1) * width))
    return torch.empty(tokens, width).uniform_(-bound, bound)


class PrefixNetwork(nn.Module):
    """What the prefixes of all blocks come from while they train.

        [P_k1, P_v1, P_k2, ...] = W_2 tanh(W_1 E + b_1) + b_2,  E ~ N(0, 1), linears as `nn.Linear` makes them

    Args:
        num_virtual_tokens: rows of E.
        width: channels of E.
        hidden: channels of the layer between.
        sizes: channels of the keys and of the values of each block.
    """

    def __init__(self, num_virtual_tokens: int, width: int, hidden: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.embedding = nn.Parameter(torch.randn(num_virtual_tokens, width))
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, sum(sizes))

    def forward(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, (num_virtual_tokens, channels of all heads) each."""
        hidden = torch.tanh(self.down(self.embedding))
        starts = [sum(self.sizes[: 2 * index + part]) for part in range(3)]
        rows = slice(starts[0], starts[2])
        keys, values = F.linear(hidden, self.up.weight[rows], self.up.bias[rows]).tensor_split(
            [starts[1] - starts[0]], dim=-1
        )
        return keys, values


class ProducedPrefixes(nn.Module):
    """The prefixes that a `PrefixNetwork` has for one block.

    Args:
        index: which block of the network.
        heads: of the attention's keys.
        dropout: probability, for each element of each image.
    """

    def __init__(self, index: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.index, self.heads = index, heads
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, heads, num_virtual_tokens, channels of a head) each."""
        keys, values = network(self.index)
        return _heads(keys, batch_size, self), _heads(values, batch_size, self)

    def stored(self, network: nn.Module) -> Prefixes:
        """The same prefixes as parameters."""
        keys, values = network(self.index)
        widths = [x.shape[-1] // self.heads for x in (keys, values)]
        prefixes = Prefixes(len(keys), self.heads, widths[0], widths[1], self.dropout.p)
        trains = next(network.parameters()).requires_grad
        prefixes.keys = nn.Parameter(keys.detach().clone(), requires_grad=trains)
        prefixes.values = nn.Parameter(values.detach().clone(), requires_grad=trains)
        return prefixes.train(self.training)


def _heads(prefix: Tensor, batch_size: int, equation: Prefixes | ProducedPrefixes) -> Tensor:
    dropped = equation.dropout(prefix.expand(batch_size, -1, -1))
    return dropped.unflatten(-1, (equation.heads, -1)).transpose(1, 2)


@register(
    name="prefix",
    paper=Paper("Prefix-Tuning: Optimizing Continuous Prompts for Generation", "ACL 2021", "2101.00190"),
    summary="learned keys and values in every attention, directly or from an MLP (`store_prefixes` drops it)",
    visual_tuning="prompt: vision-driven",
    equation="softmax(Q [K; P_k]^T / sqrt(d_head)) [V; P_v];  [P_k, P_v] of all blocks = MLP(E) with reparam_dim",
    counts=(({}, 184_320), ({"num_virtual_tokens": 30, "reparam_dim": 512}, 9_872_384)),
    mergeable=False,
    identity_at_start=False,
    training=Training(3e-3),
)
@dataclass
class PrefixConfig(VisualPeftConfig):
    """Config of prefix tuning, arXiv 2101.00190.

    Every attention gets learned keys and values, which all queries see. They follow the projections, so they have no
    position, and neither rotation nor relative biases concern them; where an attention compares directions (Swin v2),
    they are normalised as its own keys are. Attention that works in windows or on reduced keys has the same prefixes
    in every window.

    The paper's MLP, one for all blocks, is `reparam_dim`; `store_prefixes` drops it after training and keeps what it
    makes, 552,960 elements for 30 prefixes on ViT-B/16. Without it the prefixes are parameters themselves, Xavier-
    uniform as in code for vision (ModelScope's vision_efficient_tuning).

    Args:
        num_virtual_tokens: keys, and as many values, a block.
        reparam_dim: hidden width of the MLP that makes the prefixes; None: they are parameters themselves.
        dropout: probability of dropping an element of a prefix.
    """

    num_virtual_tokens: int = field(default=10, metadata={"help": "Keys, and as many values, a block."})
    reparam_dim: int | None = field(
        default=None, metadata={"help": "Hidden width of an MLP that makes the prefixes.", "tiny": 4}
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropping an element of a prefix."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)
        if self.reparam_dim is not None:
            self._require_integer("reparam_dim", 1, 100_000)
        self._require_number("dropout", 0.0, below=1.0)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """In the attention of every block that has one."""
        blocks = attending(backbone)
        network = None
        if self.reparam_dim is not None:
            sizes = [size for block in blocks for size in key_and_value_widths(block, backbone)]
            network = Shared(
                "network", partial(PrefixNetwork, self.num_virtual_tokens, backbone.width, self.reparam_dim, sizes)
            )
        for index, block in enumerate(blocks):
            yield Placement(block.path, "heads", KeyValueSite(), partial(self._build, index, block), network)

    def _build(self, index: int, block: Block, module: nn.Module) -> Prefixes | ProducedPrefixes:
        heads, key_width, value_width = heads_in(block, module)
        if self.reparam_dim is None:
            return Prefixes(self.num_virtual_tokens, heads, key_width, value_width, self.dropout)
        return ProducedPrefixes(index, heads, self.dropout)


def attending(backbone: VisionBackbone) -> list[Block]:
    """The blocks in which keys and values can join those of attention."""
    return [block for block in backbone.blocks if block.projections and "attention" in block.sublayers]


def heads_in(block: Block, module: nn.Module) -> tuple[int, int, int]:
    """How many heads a block's keys have, and channels of a head in keys and in values.

    Args:
        block: in the backbone.
        module: the block itself.
    """
    query, key, value = (path.removeprefix(f"{block.path}.") for path in block.projections)
    return head_sizes(projections(module, attention_path(module, query), query, key, value))


def key_and_value_widths(block: Block, backbone: VisionBackbone) -> tuple[int, int]:
    """Channels of a block's keys and values.

    Args:
        block: of the backbone.
        backbone: with the sizes of its linears.
    """
    query, key, value = block.projections
    out = {path: backbone.linears[path][0] for path in (query, key, value)}
    if key == value:
        return (out[key] // (3 if query == key else 2),) * 2
    return out[key] // (2 if query == key else 1), out[value]


@torch.no_grad()
def store_prefixes(model: PeftModel, adapter_name: str = "default") -> None:
    """Replace the MLP of prefix tuning by the prefixes that it makes, which are then the adapter's parameters.

    Do this after training, before the adapter is saved. Outputs in evaluation stay the same.

    Args:
        model: with the adapter.
        adapter_name: which one.

    Raises:
        ValueError: the adapter has no such MLP.
    """
    config: Any = model.peft_config.get(adapter_name)
    holders = [each for each in (config, *getattr(config, "parts", ())) if getattr(each, "reparam_dim", None)]
    if not holders:
        about = "there is none" if config is None else f"its config is {type(config).__name__}"
        about = "its reparam_dim is None" if hasattr(config, "reparam_dim") else about
        raise ValueError(f"Adapter {adapter_name!r} has no MLP that makes prefixes: {about}.")
    layers = [m for m in model.modules() if isinstance(m, VisualTunerLayer) and adapter_name in m.plans]
    replaced = set()
    for layer in layers:
        for attribute, _, network, _ in layer.plans[adapter_name]:
            slot: Any = getattr(layer, attribute, {})
            equation = slot[adapter_name] if adapter_name in slot else None  # noqa: SIM401 - ModuleDict has no get
            if isinstance(equation, ProducedPrefixes):
                slot[adapter_name] = equation.stored(layer.exchange.shared[network, adapter_name])
                replaced.add(network)
    for layer in layers:  # no block needs the network any more
        plan = []
        for planned in layer.plans[adapter_name]:
            if planned.attribute in replaced:
                del getattr(layer, planned.attribute)[adapter_name]
                layer.exchange.shared.pop((planned.attribute, adapter_name))
            else:
                plan.append(planned._replace(shared=None) if planned.shared in replaced else planned)
        layer.plans[adapter_name] = tuple(plan)
    for holder in holders:
        holder.reparam_dim = None
