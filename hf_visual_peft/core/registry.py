"""How a method becomes known to peft: one decorator, and the list of registered methods."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from ..tables import close_names, did_you_mean
from ..training.defaults import USUAL, Training


_OF_PEFT = frozenset(field.name for field in fields(PeftConfig))


class VisualPeftType(str):
    """The `peft_type` of a method of this library.

    peft's own `PeftType` is an enum that cannot be extended. peft only looks types up in dictionaries and reads
    `.value`, so a string with that attribute is enough: it is equal to the string in `adapter_config.json` and has the
    same hash.
    """

    __slots__ = ()

    @property
    def value(self) -> str:
        """The plain string, e.g. `"VPT"`."""
        return str(self)

    @property
    def name(self) -> str:
        """The same as `value`: name and value of a method never differ."""
        return str(self)


@dataclass(frozen=True)
class Paper:
    """The paper of a method.

    Attributes:
        title: the paper's title.
        venue: conference and year.
        arxiv: arXiv identifier without version, e.g. `"2203.12119"`; None if the paper is not on arXiv.
        page: URL of the paper if it is not on arXiv.
    """

    title: str
    venue: str
    arxiv: str | None
    page: str | None = None

    @property
    def url(self) -> str:
        """The paper's page."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else str(self.page)


VisualTuning = Literal[
    "fine-tuning",
    "prompt: vision-driven",
    "adapter: sequential",
    "adapter: parallel",
    "adapter: mix",
    "parameter: bias",
    "parameter: weight",
    "parameter: weight and bias",
    "several",
]


@dataclass(frozen=True)
class Method:
    """All facts about a registered method that need no model.

    Attributes:
        name: lower-case name used on command lines and as prefix of parameter names, e.g. `"vpt"`.
        config_cls: the `PeftConfig`.
        tuner_cls: its `BaseTuner`.
        paper: its source.
        category: branch of the taxonomy of "Parameter-Efficient Fine-Tuning for Pre-Trained Vision Models" (arXiv
            2402.02242), taken from the method's folder.
        visual_tuning: branch of that of "Visual Tuning" (arXiv 2305.06061).
        equation: the method in one line.
        summary: where it acts and with what, in a few words without a capital, e.g. "a bottleneck beside every MLP".
        counts: trainable parameters on ViT-B/16-224 without the head, by fields of the config: pairs of (fields,
            count). The first is for the paper's usual setting.
        mergeable: whether the adapter folds into the weights of the backbone.
        gradients: how far gradients cross the backbone: all of it, a part, or not at all.
        identity_at_start: whether a fresh adapter leaves the backbone's output unchanged.
        calibrated: whether the method chooses from data, by `hf_visual_peft.calibrate`, before it can train.
        head_inputs: extra inputs of the task head on ViT-B/16-224 with the first of the counts. Each class has as many
            extra parameters; the counts exclude them, like the head.
        training: settings for AdamW that suit it; the recipe's defaults.
    """

    name: str
    config_cls: type
    tuner_cls: type
    paper: Paper
    category: str
    visual_tuning: str
    equation: str
    counts: tuple[tuple[dict[str, Any], int], ...]
    mergeable: bool
    gradients: Literal["full", "partial", "none"]
    identity_at_start: bool
    calibrated: bool
    head_inputs: int = 0
    training: Training = USUAL
    summary: str = ""

    @property
    def video(self) -> bool:
        """Whether it takes videos, `pixel_values` of (batch, frames, channels, height, width)."""
        return bool(self.config_cls.video)  # type: ignore[attr-defined]

    @property
    def whole_modules(self) -> bool:
        """Whether it trains copies of whole modules of the model instead of equations."""
        return bool(self.config_cls.whole_modules)  # type: ignore[attr-defined]

    @property
    def chooses_blocks(self) -> bool:
        """Whether it acts in blocks, of which `layers_to_transform` chooses some."""
        return bool(self.config_cls.chooses_blocks)  # type: ignore[attr-defined]

    @property
    def peft_type(self) -> VisualPeftType:
        """The type as in `adapter_config.json`."""
        return VisualPeftType(self.name.upper())


_METHODS: dict[str, Method] = {}
_TUNER: list[type] = []  # the base of all tuners, once it is known

ConfigT = TypeVar("ConfigT", bound=type)


def list_methods() -> MappingProxyType[str, Method]:
    """Every registered method by name, in alphabetical order; a read-only view."""
    return MappingProxyType(dict(sorted(_METHODS.items())))


def targeted_methods() -> tuple[str, ...]:
    """Names of the methods that take `target_modules`: their equations can stand at single modules of any model."""
    return tuple(
        name
        for name, method in list_methods().items()
        if "target_modules" in {field.name for field in fields(method.config_cls)}
    )


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    try:
        return _METHODS[name.lower()]
    except KeyError:
        raise ValueError(f"Unknown method {name!r}: choose one of {', '.join(list_methods())}.") from None


TunerT = TypeVar("TunerT", bound=type)


def tuner_base(tuner_cls: TunerT) -> TunerT:
    """Make a class the base of the tuners of all methods that are registered from now on.

    Args:
        tuner_cls: the class; it is returned unchanged, so that this is a decorator.
    """
    _TUNER[:] = [tuner_cls]
    return tuner_cls


def register(
    *,
    name: str,
    paper: Paper,
    visual_tuning: VisualTuning,
    equation: str,
    counts: Iterable[tuple[dict[str, Any], int]],
    mergeable: bool,
    identity_at_start: bool,
    gradients: Literal["full", "partial", "none"] = "full",
    calibrated: bool = False,
    head_inputs: int = 0,
    training: Training = USUAL,
    summary: str = "",
) -> Callable[[ConfigT], ConfigT]:
    """Make a config class a peft method, known to `get_peft_model`, saving, loading and transformers.

    Stands above `@dataclass` on a subclass of `VisualPeftConfig`. The arguments are those of `Method`.

    Raises:
        ValueError: the name or its parameter prefix is taken, by peft or by another method.
    """

    def decorate(config_cls: ConfigT) -> ConfigT:
        tuner_cls = enlist(config_cls, name, _TUNER[0])
        module = sys.modules[config_cls.__module__]
        _METHODS[name] = Method(
            name=name,
            config_cls=config_cls,
            tuner_cls=tuner_cls,
            paper=paper,
            category=module.__name__.rpartition(".")[0].rpartition(".")[2],
            visual_tuning=visual_tuning,
            equation=equation,
            counts=tuple(counts),
            mergeable=mergeable,
            gradients=gradients,
            identity_at_start=identity_at_start,
            calibrated=calibrated,
            head_inputs=head_inputs,
            training=training,
            summary=summary,
        )
        return config_cls

    return decorate


def enlist(config_cls: Any, name: str, base: type) -> type:
    """Make a config class known to peft.

    Args:
        config_cls: of a method.
        name: of the method.
        base: of its tuner, which is made here.

    Returns:
        The tuner.

    Raises:
        ValueError: the name or its parameter prefix is taken.
    """
    prefix = f"{name}_"
    peft_type = VisualPeftType(name.upper())
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING or prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ValueError(f"Cannot register {config_cls.__name__}: peft already has a method named {name!r}.")
    module = sys.modules[config_cls.__module__]
    tuner_name = config_cls.__name__.removesuffix("Config") + "Model"
    tuner_cls = type(
        tuner_name,
        (base,),
        {"prefix": prefix, "__module__": module.__name__, "__doc__": f"peft tuner of `{config_cls.__name__}`."},
    )
    setattr(module, tuner_name, tuner_cls)  # so that pickle finds the class by its name
    config_cls.method_type = peft_type
    _accept_saved_fields(config_cls)
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
    return tuner_cls


def _accept_saved_fields(config_cls: type) -> None:
    """Let a config be built from a file with unknown fields, and record these.

    peft drops such fields with a warning and a model built from the remaining fields
    may compute something other than what was trained. So the config keeps their names and refuses to be applied to a
    model. Only files contain `peft_type`: a call with a misspelt field raises a `TypeError` with the close names.
    """
    init = config_cls.__init__  # type: ignore[misc]
    known = {field.name for field in fields(config_cls) if field.init}

    @functools.wraps(init)
    def from_call_or_file(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - known)
        if unknown and "peft_type" not in kwargs:
            raise TypeError(
                f"{config_cls.__name__}.__init__() got an unexpected keyword argument {unknown[0]!r}. "
                + _advice(unknown[0], known)
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {config_cls.__name__}, these are ignored. The "
                "configuration comes from another version or was damaged; it cannot be applied to a model.",
                stacklevel=3,
            )
        init(self, *args, **{key: value for key, value in kwargs.items() if key not in unknown})
        self.unknown_fields = unknown
        self.from_file = "peft_type" in kwargs

    from_call_or_file.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    config_cls.__init__ = from_call_or_file  # type: ignore[misc]


def _advice(name: str, known: Iterable[str]) -> str:
    """The fields of a config that a misspelt name may mean, or all that there are."""
    close = close_names(name, known) or sorted(field for field in known if name in field)
    return did_you_mean(close) or f"Its fields are {', '.join(sorted(set(known) - _OF_PEFT))}."
