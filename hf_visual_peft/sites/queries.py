"""The way of further tokens through a block whose own tokens do not see them.

The block runs twice: on its own tokens, and then on the further ones, with the keys and values that its attention has
made of its own. Norms, layer scale, residual connections and the MLP are the block's, however it writes them. Where
attention goes through transformers' interface, keys and values are kept and put in there; a few modules that compute
attention in a way of their own have a function here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import has_interface
from .masks import PositionBias, for_queries


Forward = Callable[..., Any]
_MASKS = ("attention_mask", "attn_mask")
_BIAS = "relative_position_bias"  # queries have no position, so none
_ROTATION = "position_embeddings"  # and are not rotated


def takes_queries(block: nn.Module, query: str, prompts: str | None) -> bool:
    """Whether further queries can see what the attention of a block sees: all its tokens, by a plain softmax.

    Args:
        block: the block.
        query: name of the query projection in the block; empty where it has none.
        prompts: of the architecture's table.
    """
    if not query:
        return False
    if has_interface(block, query):
        return prompts == "sequence"
    return _answer_of(block.get_submodule(query.rpartition(".")[0])) is not None


class QueryPath:
    """Where keys and values of a block's own tokens are kept, and where further tokens get to see them.

    Args:
        block: as `takes_queries` has it.
        query: name of the query projection in it.
        key: the projection to keys.
        value: the projection to values, which may be the same.
        biases: modules of the block that make its bias on attention logits.
    """

    def __init__(
        self, block: nn.Module, query: str, key: nn.Module, value: nn.Module, biases: list[PositionBias]
    ) -> None:
        self.attention = block.get_submodule(query.rpartition(".")[0])
        self.interface = has_interface(block, query)
        self.key, self.value, self.biases = key, value, biases
        self.kept: dict[str, Tensor] | None = None  # while the block runs on its own tokens
        self.seen: tuple[Tensor, Tensor] | None = None  # while it runs on the further ones
        names = list(inspect.signature(type(block).forward).parameters)[2:]
        known = (*_MASKS, _BIAS, _ROTATION)
        self._positions = {name: position for position, name in enumerate(names) if name in known}
        self.handles: list[Any] = []
        if not self.interface:
            self.handles.append(key.register_forward_hook(partial(self._keep, "key")))
            self.handles.append(value.register_forward_hook(partial(self._keep, "value")))

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.kept is not None:
            self.kept[name] = output

    def see(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Keys and values for transformers' interface, and whether they stand in for the queries' own."""
        if self.seen is not None:
            return *self.seen, True
        if self.kept is not None:
            self.kept |= {"key": key, "value": value}
        return key, value, False

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention module does instead of its own forward when it is called with further tokens."""
        answer = _answer_of(self.attention)
        assert answer is not None
        assert self.seen is not None
        return answer(self.attention, *self.seen, *args, **kwargs)

    def run(self, forward: Forward, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Forward]:
        """Call the block with its own tokens.

        Args:
            forward: of the block.
            x: its own tokens.
            args: of the block, behind these.
            kwargs: of the block.

        Returns:
            What the block returns, and the function that asks it: (batch, queries, width) to the same.
        """
        self.kept = {}
        try:
            output = forward(x, *args, **kwargs)
            seen = self.kept["key"], self.kept["value"]
        finally:
            self.kept = None
        return output, partial(self._ask, forward, seen, x.dtype, *self._for_queries(args, kwargs))

    def _ask(
        self,
        forward: Forward,
        seen: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        args: tuple,
        kwargs: dict[str, Any],
        queries: Tensor,
    ) -> Tensor:
        self.seen = seen
        for bias in self.biases:
            bias.asked = True
        try:
            output = forward(queries.to(dtype), *args, **kwargs)
        finally:
            self.seen = None
            for bias in self.biases:
                bias.asked = False
        return (output[0] if isinstance(output, tuple) else output).to(queries.dtype)

    def _for_queries(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The block's arguments, for further tokens."""

        def change(name: str, value: Any) -> Any:
            if name == _BIAS or value is None:
                return None
            if name == _ROTATION:
                return tuple(table[..., :0, :] for table in value)
            return for_queries(value, name)

        changed = list(args)
        kwargs = dict(kwargs)
        for name, position in self._positions.items():
            if position < len(args):
                changed[position] = change(name, args[position])
            elif name in kwargs:
                kwargs[name] = change(name, kwargs[name])
        return tuple(changed), kwargs


def _answer_of(module: nn.Module) -> Forward | None:
    owner = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return _ANSWERS.get(f"{owner.__module__}.{owner.__name__}") or _ANSWERS.get(owner.__name__)


def _heads(x: Tensor, number: int) -> Tensor:
    """(batch, tokens, channels) to (batch, heads, tokens, channels of a head)."""
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def _mixed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What heads answer, (batch, queries, channels)."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2).flatten(2)


def _data2vec(module: Any, key: Tensor, value: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Without the bias of positions, which queries do not have."""
    number = module.num_attention_heads
    return _mixed(_heads(module.query(x), number), _heads(key, number), _heads(value, number)), None


def _perceiver(module: Any, key: Tensor, value: Tensor, x: Tensor, mask: Tensor | None = None, *args: Any) -> tuple:
    """With a norm of its own; no mask comes to the layers that attend to themselves."""
    assert mask is None
    number = module.num_heads
    query = _heads(module.query(module.layernorm1(x)), number)
    return (_mixed(query, _heads(key, number), _heads(value, number)),)


def _split(
    module: Any, key: Tensor, value: Tensor, x: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Of `SplitAttention`, as torchvision's blocks call it."""
    assert attn_mask is None
    number = module.num_heads
    return module.out_proj(_mixed(_heads(module.q_proj(x), number), _heads(key, number), _heads(value, number))), None


def _timm(
    module: Any,
    key: Tensor,
    value: Tensor,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Of vision transformers, and of EVA and DINOv3, whose patches have rotary positions and queries none."""
    number, groups = module.num_heads, getattr(module, "num_kv_groups", 1)
    query = x
    if getattr(module, "q_proj", None) is not None:
        query, keys, values = module.q_proj(x), _heads(key, number // groups), _heads(value, number // groups)
    else:
        query = module.qkv(x).chunk(3, dim=-1)[0]
        _, keys, values = (_heads(part, number) for part in key.chunk(3, dim=-1))
    keys = module.k_norm(keys)
    if rope is not None:
        rotate: Any = sys.modules[type(module).__module__].apply_rot_embed_cat
        prefix, patches = keys.tensor_split([module.num_prefix_tokens], dim=2)
        turned = rotate(patches, rope, half=getattr(module, "rotate_half", False))
        keys = torch.cat([prefix, turned], dim=2).type_as(values)
    keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
    mixed = module.norm(_mixed(module.q_norm(_heads(query, number)), keys, values, attn_mask, module.scale))
    if module.gate is not None:
        mixed = mixed * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(mixed))


def _timm_vit(
    module: Any,
    key: Tensor,
    value: Tensor,
    x: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    return _timm(module, key, value, x, None, attn_mask, is_causal)


_ANSWERS: dict[str, Forward] = {
    "Data2VecVisionSelfAttention": _data2vec,
    "Data2VecVisionSdpaSelfAttention": _data2vec,
    "PerceiverSelfAttention": _perceiver,
    "SplitAttention": _split,
    "timm.layers.attention.Attention": _timm_vit,
    "timm.models.eva.EvaAttention": _timm,
    "timm.layers.attention.AttentionRope": _timm,
}
