"""Requirements of equations inside and around a block, checked in its first call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.backbone import SUBLAYER_ROLES, Block


def require_stream(block: nn.Module, stream: Any, packed: bool) -> None:
    """Refuse a block that is not called with a batch of token sequences or maps.

    Args:
        block: the block.
        stream: its input.
        packed: whether the role table says that the tokens of all images are in one row, (tokens, width).

    Raises:
        ValueError: it gets something else; the message names methods that do not need it.
    """
    if isinstance(stream, Tensor) and (stream.ndim > 2 or (packed and stream.ndim == 2)):
        return
    what = f"a stream of {stream.ndim} dimensions" if isinstance(stream, Tensor) else f"a {type(stream).__name__}"
    raise ValueError(
        f"{type(block).__name__} gets {what}, where methods at blocks need (batch, tokens, width) or maps. Use a "
        "method that acts on linears and norms, such as SSF, BitFit or peft's LoRA."
    )


@dataclass
class NormFirst:
    """The hooks that check, in the first call, that a norm precedes its sub-layer, as the role table says.

    Attributes:
        norm: its name in the model.
        reader: name of the first module of the sub-layer.
        running: whether the block runs on its own tokens; else a call does not count.
        called: whether the norm was called.
        handles: of both hooks.
    """

    norm: str
    reader: str
    running: Callable[[], bool]
    called: bool = False
    handles: list[Any] = field(default_factory=list)

    def hook(self, find: Callable[[str], list[nn.Module]]) -> None:
        """Set the hooks."""
        self.handles = [
            *(module.register_forward_pre_hook(self._at_norm) for module in find(self.norm)),
            *(module.register_forward_pre_hook(self._at_reader) for module in find(self.reader)),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        while self.handles:
            self.handles.pop().remove()

    def _at_norm(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling() and self.running():
            self.called = True

    def _at_reader(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or not self.running():
            return
        if not self.called:
            raise ValueError(
                f"{self.reader!r} is called before {self.norm!r}, though the role table has this norm before it. Say "
                "there that norms follow their sub-layers: Architecture(post_norm=True, ...), or post_norm_blocks."
            )
        self.remove()


def norms_first(block: Block, find: Callable[[str], list[nn.Module]], running: Callable[[], bool]) -> list[NormFirst]:
    """Check that the norms of a block precede their sub-layers, as the table says.

    Args:
        block: whose norms do not follow its sub-layers.
        find: returns the modules with a name in the model.
        running: whether the block runs on its own tokens.
    """
    checks = []
    for sublayer in block.sublayers:
        norm, reader, *_ = (block.roles[role] for role in SUBLAYER_ROLES[sublayer])
        if norm and reader and block.entrances[sublayer] == norm[0]:
            checks.append(NormFirst(norm[0], reader[0], running))
            checks[-1].hook(find)
    return checks
