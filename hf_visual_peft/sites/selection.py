"""The site that chooses which tokens a sub-layer acts on, and the part of a block's adapters that serves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backbones.architectures import GridKind, Stream
from ..backbones.backbone import Block, VisionBackbone
from ..backbones.modes import in_eval_mode
from ..backbones.paths import within
from .block_sites import Pass
from .grid import from_tokens, to_tokens
from .layer import VisualTunerLayer, call_equation
from .site import BlockSite


class ChoiceEquation(Protocol):
    """What an equation that chooses tokens is called with."""

    def __call__(self, patches: Tensor, *shared: nn.Module) -> Tensor:
        """A factor for each patch, (batch, patches): 1 where the MLP acts on it, 0 where not.

        Args:
            patches: of the stream before the norm of the MLP, (batch, patches, width).
            shared: modules of the adapter.
        """
        ...


@dataclass(frozen=True)
class ChoiceSite(BlockSite):
    """The patches that the MLP of a block acts on: its output is multiplied by a factor for each, 0 or 1.

    Prefix tokens and prompts always pass the MLP. In evaluation mode, where no gradient reaches the factors, the MLP
    computes nothing for the others: it runs on the chosen tokens alone, if it treats each token by itself. Models that
    train, and compiled and exported ones, run it on all, as shapes would depend on data. The result is the same.
    """

    at = "mlp"

    def why_no_text(self) -> str | None:
        """Tokens of a text are no patches."""
        return ": it chooses among the patches of an image."

    def exists_at(self, block: Block, whole: VisionBackbone) -> bool:
        """Where there is an MLP."""
        return "mlp" in block.sublayers

    def connect(self, layer: Any, model: nn.Module, backbone: VisionBackbone | None) -> None:
        """Let the layer's MLP run on some tokens."""
        layer.let_mlp_skip()

    def describe(self, names: Mapping[str, str]) -> str:
        """What it chooses."""
        return "which patches {} acts on"


class ChoosingLayer(VisualTunerLayer):
    """The part of `BlockAdapters` that lets the MLP act on chosen tokens only."""

    _block: Block
    _stream: Stream
    _stream_inside: Stream
    _grid_kind: GridKind | None
    _post_norm: bool
    _pass: Pass | None

    def _init_choice(self) -> None:
        self._chooses = False  # whether an equation chooses tokens here
        self._skips: bool | None = None  # whether the MLP can run on some tokens alone, once it was tried

    def let_mlp_skip(self) -> None:
        """Let the MLP run on the chosen tokens alone from now on."""
        if not self._chooses:
            self._chooses = True
            self.set_hooks_again()

    def set_hooks_again(self) -> None:
        """Set the hooks in the block again."""
        raise NotImplementedError

    def _versions(self, path: str) -> list[nn.Module]:
        raise NotImplementedError

    def _on_extra_tokens(self) -> Any:
        raise NotImplementedError

    def _positions_of(self, current: Pass) -> Tensor:
        raise NotImplementedError

    def _hook_mlp(self) -> Iterator[Any]:
        """Set the hooks at the MLP, of which these are the handles."""
        ends, entrance = _mlp_of(self._block), self._block.entrances.get("mlp", "")
        if not self._chooses or not ends:
            return
        # without a norm before it, the choice is made where its first linear is called
        inside = within(entrance, ends[:1]) is not None
        if inside and len(self._block.roles["fc1"]) > 1:
            return
        for module in self._versions(entrance if inside else ends[0]):
            yield module.register_forward_pre_hook(self._before_chosen)
        for module in self._versions(ends[-1]):
            yield module.register_forward_hook(self._after_chosen)

    def _choose(self, current: Pass, stream: Tensor) -> None:
        """Ask the equations which tokens the MLP acts on.

        Args:
            current: of the block.
            stream: before the norm of the MLP, (batch, tokens, width).
        """
        for each in self._at(ChoiceSite):
            assert each.module is not None
            patches = stream[:, current.prefix :]
            factors = self._left(each, call_equation(self, each.module, patches, *each.shared))
            factors = torch.cat([factors.new_ones(len(stream), current.prefix), factors], dim=1)
            current.chosen = factors if current.chosen is None else current.chosen * factors

    def _before_chosen(self, module: nn.Module, args: tuple) -> tuple | None:
        """Hand the MLP the chosen tokens alone, of all images in one row."""
        current = self._pass
        if current is None or torch.compiler.is_compiling():
            return None
        # in training the host would wait for the number of chosen tokens
        chosen = None if current.chosen is None or current.chosen.requires_grad or module.training else current.chosen
        if (chosen is None and current.stay is None) or not self._can_skip():
            return None
        x = args[0]
        tokens = to_tokens(x, self._stream_inside)
        if chosen is None:
            first = torch.arange(len(tokens), device=x.device).unsqueeze(1) * tokens.shape[1]
            rows = (first + self._positions_of(current)).flatten()
        else:
            rows = chosen.flatten().nonzero().flatten()
        if len(rows) == tokens.shape[0] * tokens.shape[1]:
            return None
        current.rows, current.like = rows, x
        current.skipped = chosen is not None and not self._norm_follows()
        # at least one, as convolutions refuse empty maps
        taken = tokens.flatten(0, 1).index_select(0, rows if len(rows) else rows.new_zeros(1))
        return (self._row(taken, x.ndim), *args[1:])

    def _after_chosen(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Put the output of the chosen tokens in their places; that of the others is zero."""
        current = self._pass
        if current is None or current.rows is None:
            return None
        rows, x = current.rows, current.like
        current.rows = current.like = None
        assert x is not None
        tokens = to_tokens(x, self._stream_inside)
        found = to_tokens(output, self._stream_inside)[0, : len(rows)]
        out = found.new_zeros(tokens.shape[0] * tokens.shape[1], found.shape[1]).index_copy_(0, rows, found)
        return from_tokens(out.unflatten(0, tokens.shape[:2]), x, self._stream_inside)

    def _row(self, tokens: Tensor, ndim: int) -> Tensor:
        """Tokens in the layout of the MLP's input, as one image with one row."""
        if ndim == 3:
            return tokens[None]
        return tokens.mT[None, :, None] if self._stream_inside == "channels_first" else tokens[None, None]

    def _chosen_only(self, current: Pass, stream: Tensor) -> Tensor:
        """The stream after the MLP, where that acts on the chosen tokens only.

        Args:
            current: of the block.
            stream: after the MLP, (batch, tokens, width), without the additions of branches.
        """
        if current.chosen is None or current.skipped:
            return stream
        assert current.before is not None
        # exact where the factor is 1
        return stream + (current.chosen.to(stream.dtype) - 1).unsqueeze(-1) * (stream - current.before)

    def _norm_follows(self) -> bool:
        """Whether something after the MLP makes of its zeros what is not zero."""
        attention = {path.rpartition(".")[0] for path in self._block.roles["query"]} - {self._block.path}
        inside = (*_mlp_of(self._block), *attention)
        return self._post_norm or any(not within(path, inside) for path in self._block.roles["further_norms"])

    def _can_skip(self) -> bool:
        """Whether the MLP treats each token by itself, by a short run; once."""
        if self._skips is not None:
            return self._skips
        mlp = nn.Sequential(*(self._versions(path)[0] for path in dict.fromkeys(_mlp_of(self._block))))
        fc1 = self._versions(self._block.roles["fc1"][0])[0]
        weight = next(p for p in fc1.parameters() if p.is_floating_point())
        width = self._block.width or weight.shape[1]
        tokens = torch.arange(4 * width, device=weight.device).sin().to(weight.dtype).view(4, width)
        ndim = 3 if self._grid_kind != "map" else 4
        mixed, self.exchange.mixed = self.exchange.mixed, None
        try:
            with in_eval_mode(mlp), torch.no_grad(), self._on_extra_tokens():
                every, some = (mlp(self._row(each, ndim)) for each in (tokens, tokens[1::2]))
            every, some = (to_tokens(each, self._stream_inside)[0] for each in (every, some))
            tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
            self._skips = every.shape == tokens.shape and bool(
                (every[1::2] - some).abs().max() <= tolerance * every.abs().max()
            )
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ):  # of a module that needs the shape of the image, or more arguments
            self._skips = False
        finally:
            self.exchange.mixed = mixed
        return self._skips


def _mlp_of(block: Block) -> tuple[str, ...]:
    """Full names of the modules inside a block that are its MLP, the first and the last, which may be one."""
    first, last = ((*block.roles[role], "")[0] for role in ("fc1", "fc2"))
    if not first or not last:
        return ()
    steps, others = first.split("."), last.split(".")
    common = next(i for i, (a, b) in enumerate(zip([*steps, ""], [*others, " "], strict=False)) if a != b)
    depth = block.path.count(".") + 1
    if common > depth:
        return (".".join(steps[:common]),) * 2
    return (".".join(steps[: depth + 1]), ".".join(others[: depth + 1]))
