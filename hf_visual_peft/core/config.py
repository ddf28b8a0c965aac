"""The base of all configs, and hooks for saving."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..backbones.architectures import TOWERS, Tower
from .fields import CheckedFields
from .registry import get_method


if TYPE_CHECKING:
    from torch import Tensor

    from ..backbones.backbone import VisionBackbone
    from ..sites import Exchange, Placement
    from .calibration import Calibration
    from .outcome import Outcome
    from .registry import VisualPeftType


_SAVED: list[Callable[[str, VisualPeftConfig], None]] = []


def on_saving(listener: Callable[[str, VisualPeftConfig], None]) -> None:
    """Call a function each time an adapter of this library was saved.

    Args:
        listener: gets the folder, with config and weights, and the config.
    """
    _SAVED.append(listener)


@dataclass
class VisualPeftConfig(CheckedFields, PeftConfig):
    """Base of all configs.

    Args:
        layers_to_transform: index or indices of the blocks to adapt, from 0; all by default.
        exclude_modules: names, or a regular expression for full names, of modules that must not be adapted.
        modules_to_save: modules of which to train and save copies, by names or ends of names. None means the task
            head, found by its role in the architecture; `[]` means none. If the method would act in one of these
            modules, it skips it, with a warning.
        init_weights: whether to use the method's own initialisation; False adds random numbers to every weight.
        train_norm_statistics: whether the running statistics of batch norms are updated; they are then saved with the
            adapter. Else they stay those of the backbone.
        backbone: path of the backbone to adapt, in a model that holds several; the only one by default.
        tower: what to adapt in a model of images and texts, such as CLIP: `"vision"`, `"text"` or `"both"`. With both,
            each tower is adapted as it would be alone: `layers_to_transform` counts the blocks of each, and equations
            share modules only within a tower.
    """

    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt, from 0; all by default."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression for full names, of modules not to adapt."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Extra modules to train and save; default: the task head. []: none."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Use the method's initialisation; False adds random numbers to it."}
    )
    train_norm_statistics: bool = field(
        default=False,
        metadata={"help": "Update the running statistics of batch norms; they are saved with the adapter."},
    )
    backbone: str | None = field(
        default=None, metadata={"help": "Path of the backbone to adapt, in a model that holds several."}
    )
    tower: Literal["vision", "text", "both"] = field(
        default="vision", metadata={"help": "What to adapt in a model of images and texts: vision, text or both."}
    )

    method_type: ClassVar[VisualPeftType]
    # peft reads these of every config; methods that have them make them fields
    target_modules: ClassVar[Any] = None
    target_parameters: ClassVar[Any] = None
    unknown_fields: ClassVar[list[str]] = []
    from_file: ClassVar[bool] = False  # whether the config was read from a file, so that its adapter is trained
    filled_heads: ClassVar[list[str] | None] = None  # what replaced None in `modules_to_save`, for one model
    heads_added: ClassVar[list[str]] = []  # heads of the model that the adapter of the file lacks
    whole_modules: ClassVar[bool] = False  # whether the method trains copies of modules instead of equations
    chooses_blocks: ClassVar[bool] = True  # whether it acts in blocks, so that `layers_to_transform` chooses some
    copied_head: ClassVar[str] = ""  # if the head is one of them: name under which its copy is saved
    widened_head: ClassVar[str] = ""  # the part of its equations that makes the head wider
    per_stage: ClassVar[bool] = True  # whether the method sees blocks of one width at a time; else all blocks
    video: ClassVar[bool] = False  # whether the method takes videos, (batch, frames, channels, height, width)
    frames_meet_before_norms: ClassVar[bool] = False  # whether frames are averaged before the norms after the blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method_type
        if type(self.layers_to_transform) is int:
            self.layers_to_transform = [self.layers_to_transform]
        layers: Any = self.layers_to_transform
        if layers is not None:
            if not isinstance(layers, list | tuple | range) or not layers:
                self._fail("layers_to_transform", "None, an index, or a non-empty list of indices")
            if not all(type(layer) is int and layer >= 0 for layer in layers):
                self._fail("layers_to_transform", "indices from 0")
            self.layers_to_transform = list(layers)
        names: Any = self.modules_to_save
        if names is not None:
            if not isinstance(names, list | tuple | set) or not all(isinstance(n, str) and n for n in names):
                example = f", as [{names!r}]" if isinstance(names, str) and names else ""
                self._fail("modules_to_save", f"None or a list of names{example}")
            self.modules_to_save = sorted(names) if isinstance(names, set) else list(names)
        if self.backbone is not None and type(self.backbone) is not str:
            self._fail("backbone", "None or the path of a module")
        self._require_choice("tower", (*TOWERS, "both"))
        if isinstance(self.exclude_modules, set | tuple):
            self.exclude_modules = sorted(self.exclude_modules)
        for name in () if self.chooses_blocks else ("layers_to_transform", "exclude_modules"):
            if getattr(self, name) is not None:
                self._fail(name, f"None: {type(self).__name__} itself decides which modules it changes")

    def to_dict(self) -> dict[str, Any]:
        """The fields as in `adapter_config.json`, which has no tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; if weights are in the folder, also call the listeners of `on_saving`.

        Args:
            save_directory: folder to write to; created if it does not exist.
            kwargs: as of `PeftConfig.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        if Path(save_directory, SAFETENSORS_WEIGHTS_NAME).is_file():
            for listener in _SAVED:
                listener(save_directory, self)

    def placements(self, backbone: VisionBackbone) -> Iterable[Placement]:
        """The method's equations and their places in this backbone.

        Raises:
            ValueError: a field does not fit the backbone.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say where it acts.")

    def adapter_parts(self) -> Sequence[Any]:
        """The methods that an adapter is made of, as `core.parts.Part`; none if it is one method."""
        return ()

    def trained_parameters(self, name: str, shape: tuple[int, ...]) -> int:
        """The number of trained parameters in one tensor of the adapter's file; 0 for chosen indices.

        Args:
            name: of the tensor.
            shape: of the tensor.
        """
        return 0 if name.endswith(".indices") else math.prod(shape)

    def choose(self, calibration: Calibration) -> None:
        """Choose from data what to train, in methods that do; called by `hf_visual_peft.calibrate`."""
        raise NotImplementedError(f"{type(self).__name__} chooses nothing from data.")

    @property
    def gradients(self) -> Literal["full", "partial", "none"]:
        """How far gradients cross the backbone with these fields; for most methods the fields do not matter."""
        return get_method(self.method_type).gradients

    @property
    def chooses_from_data(self) -> bool:
        """Whether `hf_visual_peft.calibrate` must be called before training."""
        return type(self).choose is not VisualPeftConfig.choose

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the method adds a loss of its own to that of the task, with these fields."""
        return type(self).auxiliary_loss is not VisualPeftConfig.auxiliary_loss

    def auxiliary_loss(self, outcome: Outcome) -> Tensor:
        """The loss that the method adds to that of the task in training, a mean over the batch.

        Args:
            outcome: of one forward pass.
        """
        raise NotImplementedError(f"{type(self).__name__} has no auxiliary loss.")

    @contextmanager
    def extra_pass(self, exchange: Exchange, owner: str) -> Iterator[bool]:
        """Prepare an extra pass of the same batch through the model, for the auxiliary loss.

        Args:
            exchange: of the adapter layers.
            owner: method and adapter.

        Yields:
            Whether such a pass is needed.
        """
        yield False

    def initialise(self, adapter: Calibration) -> None:
        """Set initial weights that depend on the backbone's weights, in methods that have such; without data.

        Called when the adapter is put into the model, unless `init_weights` is False. Weights may be on the meta
        device.
        """

    @property
    def output_classes(self) -> int | None:
        """Number of classes of the model's output, if the method changes it."""
        return None

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers to adapt."""
        return TOWERS if self.tower == "both" else (self.tower,)

    @property
    def layers(self) -> list[int] | None:
        """The chosen blocks, None for all."""
        assert not isinstance(self.layers_to_transform, int)  # made a list above
        return self.layers_to_transform
