"""Weights of a dual encoder that an adapter has in its own version."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class OwnWeights(nn.Module):
    """Copies of some weights of a dual encoder, which stand in the place of the originals while the adapter acts.

    Args:
        encoder: the dual encoder.
        names: of the weights.
        trains: whether the copies train.
    """

    def __init__(self, encoder: nn.Module, names: Iterable[str], trains: bool = True) -> None:
        super().__init__()
        originals = dict(encoder.named_parameters())
        for name in names:
            self._hold(name, originals[name].detach().clone(), trains)

    def _hold(self, name: str, value: Tensor, trains: bool) -> None:
        key = name.replace(".", "/")  # a module has no names with dots
        if trains:
            self.register_parameter(key, nn.Parameter(value))
        else:
            self.register_buffer(key, value)

    def freeze(self) -> None:
        """Let the weights train no more, whatever is asked of parameters."""
        for key, parameter in list(self._parameters.items()):
            assert parameter is not None
            del self._parameters[key]
            self._hold(key, parameter.detach(), trains=False)

    def by_name(self) -> dict[str, Tensor]:
        """The weights, by their names in the dual encoder."""
        held = {**self._parameters, **self._buffers}
        return {key.replace("/", "."): value for key, value in held.items() if value is not None}
