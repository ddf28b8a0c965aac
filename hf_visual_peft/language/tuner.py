"""peft's interface of a tuner, for methods that act on a `ZeroShotClassifier`."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from ..core.copies import inner
from ..core.own_configs import OwnConfigs
from ..core.undoing import Structure
from .classifier import ZeroShotClassifier
from .scale import SCALE
from .slot import LanguageLayer, StoredClasses


SLOT = "adapters"  # name of the classifier's slot


class LanguageTuner(OwnConfigs):
    """Base of the tuners; registering a method makes one."""

    tuner_layer_cls = LanguageLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter into the classifier's slot.

        Args:
            model: the classifier.
            adapter_name: key of the config in `peft_config`.
            autocast_adapter_dtype: as in peft.
            low_cpu_mem_usage: whether the weights are created on the meta device.
            state_dict: not needed: there is one place.

        Raises:
            ValueError: the config does not fit the model; the model is then unchanged.
        """
        # names that are filled in are not those of the next classifier
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        before = Structure(model)
        try:
            self._check(model, config)
            assert isinstance(model, ZeroShotClassifier)
            config.class_names = config.class_names or model.class_names
            config.templates = config.templates or model.config.templates
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except BaseException:
            before.restore()
            self.peft_config.pop(adapter_name)
            raise

    def _check(self, model: nn.Module, config: Any) -> None:
        name = type(config).__name__
        if config.unknown_fields:
            raise ValueError(
                f"The configuration has fields that {name} does not know: {', '.join(config.unknown_fields)}. Install "
                "the version of hf_visual_peft that wrote it, or remove the fields if they are a mistake."
            )
        if not isinstance(model, ZeroShotClassifier):
            raise ValueError(
                f"{name} adapts a ZeroShotClassifier, and the model is a {type(model).__name__}. Load it with "
                "hf_visual_peft.ZeroShotClassifier.from_pretrained(checkpoint, class_names=[...])."
            )
        slot = model.adapters
        if isinstance(slot, StoredClasses) or (isinstance(slot, LanguageLayer) and slot.merged):
            raise ValueError(
                f"{name}: the classes have weights of their own, from a merged adapter, and the method starts from "
                "their texts. Unmerge that adapter, or load the dual encoder again."
            )
        if isinstance(model.adapters, LanguageLayer) and model.adapters.attribute != f"{self.prefix}equation":
            there = model.adapters.attribute.removesuffix("_equation")
            raise ValueError(
                f"{name} cannot act beside {there!r}, which is in the classifier: both compute the logits. Take it "
                "out first, with unload()."
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key == SLOT

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        equation = peft_config.build(parent)
        layer: Any = target if isinstance(target, LanguageLayer) else LanguageLayer(target, self.prefix, parent)
        layer.train(parent.training)
        layer.equations[adapter_name] = equation
        if not any(parameter.is_meta for parameter in equation.parameters()):
            equation.to(parent.towers.embedding.weight.device)
        setattr(parent, target_name, layer)
        layer.set_adapter(self.active_adapters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # nothing of it has a weight to move

    def unload(self) -> nn.Module:
        """Take the adapters out. The scale is then that of the dual encoder again, too."""
        original = inner(self.model.logit_scale)
        base = super().unload()
        setattr(base, SCALE, original)
        return base

    def starting_weights(self, adapter_name: str) -> dict[str, Tensor]:
        """The weights of an adapter before training, by their names in the model; for `Interpolation`.

        Raises:
            ValueError: it does not start from the texts, or not from those of now.
        """
        config: Any = self.peft_config[adapter_name]
        classifier: Any = self.model
        name = type(config).__name__
        if not config.starts_from_texts():
            raise ValueError(
                f"{name} starts from random weights, so that weights between the dual encoder and the adapter have no "
                "meaning. Those of methods that start from the texts do: FLYPConfig, WiSEFTConfig, TwoSFSConfig, "
                "TaskResConfig, CLAPConfig, CrossModalConfig, LPPlusPlusConfig, and CoOpConfig, KgCoOpConfig and "
                "ProGradConfig with init_text."
            )
        if config.templates != classifier.config.templates:
            raise ValueError(
                f"The adapter {adapter_name!r} started from the templates {config.templates[:3]}, and the classifier "
                f"has {classifier.config.templates[:3]}. Set those of the adapter: "
                "classifier.set_class_names(classifier.class_names, templates)."
            )
        start = copy.deepcopy(config).build(classifier)
        place = f"{SLOT}.{self.prefix}equation.{adapter_name}"
        found = {f"{place}.{key}": value.detach() for key, value in start.state_dict().items()}
        if config.train_logit_scale:
            fresh = inner(classifier.logit_scale).state_dict()
            found |= {f"{SCALE}.modules_to_save.{adapter_name}.{key}": value for key, value in fresh.items()}
        return found

    def _check_merge_allowed(self) -> None:
        for module in self.model.modules():
            if isinstance(module, LanguageLayer) and not module.merged:
                active: Any = module.active_adapters
                for name in [name for name in active if name in module.equations]:
                    module.linear_of(name)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names: methods for class texts do not mix adapters in a batch. Use set_adapter and one batch "
                "for each."
            )
        return nullcontext()
