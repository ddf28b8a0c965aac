"""Configs of several methods on one model."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class OwnConfigs(BaseTuner):
    """Base of the tuners of this library: each has its own configs, and the model a dictionary of all."""

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # peft's tuners of one model share its `peft_config`, where an adapter takes the place of another method's that
        # has the same name. Here each has its own configs, and the model a dictionary of all.
        others = vars(model).pop("peft_config", None)
        if others is not None:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in "
                "the model. Make sure to know what you are doing!",
                stacklevel=3,
            )
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            vars(model).pop("peft_config", None)
            if others is not None:
                vars(model)["peft_config"] = others
            raise
        vars(model)["peft_config"] = {**(others or {}), **self.peft_config}
