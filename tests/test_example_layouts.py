"""Layouts of images that towers take, found by trying, and models that read words beside pictures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_visual_peft import AdaptFormerConfig, find_backbone
from hf_visual_peft.backbones.backbone import BackboneError, SeveralError
from hf_visual_peft.backbones.examples import images_of
from hf_visual_peft.coverage.family_models import backbones_of


WIDTH, PATCH = 16, 4


class EyeConfig(PreTrainedConfig):
    """Of a tower of no library."""

    model_type = "eye_of_nobody"

    def __init__(self, layout: str = "sized", **kwargs):
        self.layout, self.image_size, self.patch_size, self.num_channels = layout, 16, PATCH, 3
        self.temporal_patch_size = 2 if layout == "timed" else None
        self.spatial_merge_size = 2 if layout == "merged" else 1
        self.num_frames = 4 if layout == "frames" else None
        super().__init__(**kwargs)


class Unit(nn.Module):
    """A block with an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(nn.functional.gelu(self.b(self.a(x))))


class Eye(PreTrainedModel):
    """A tower whose modules that run last are defined first."""

    config_class = EyeConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EyeConfig):
        super().__init__(config)
        self.last = nn.Linear(WIDTH, 5)
        values = 3 * PATCH**2 * (2 if config.layout == "timed" else 1)
        flat = config.layout in ("flat", "rows", "timed", "merged")
        self.cut: nn.Module = nn.Linear(values, WIDTH) if flat else nn.Conv2d(3, WIDTH, PATCH, PATCH)
        if flat:
            self.last = None
        self.units = nn.ModuleList([Unit(), Unit()])
        self.post_init()

    def through(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return x if self.last is None else self.last(x)


class Sized(Eye):
    """Says how many patches there are."""

    def forward(self, pixel_values: Tensor, target_sizes: Tensor) -> Tensor:
        x = self.cut(pixel_values).flatten(2).mT
        if int(target_sizes.prod()) != x.shape[1]:
            raise ValueError("sizes")
        return self.through(x)


class InPixels(Eye):
    """Says how large the images are."""

    def forward(self, pixel_values: Tensor, original_sizes: Tensor) -> Tensor:
        if tuple(original_sizes[0].tolist()) != pixel_values.shape[-2:]:
            raise ValueError("sizes")
        return self.through(self.cut(pixel_values).flatten(2).mT)


class Frames(Eye):
    """Takes frames as samples."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.cut(pixel_values).flatten(2).mT
        return self.through(x.unflatten(0, (-1, self.config.num_frames)).flatten(1, 2))


class Flat(Eye):
    """Takes the values of patches, with the samples."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch, _, values = pixel_values.shape
        return self.through(self.cut(pixel_values.reshape(batch, -1, values)))


class Timed(Eye):
    """Takes patches of two frames with their channels last."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        if tuple(pixel_values.shape[1:]) != (2, PATCH, PATCH, 3):
            raise ValueError("layout")
        return self.through(self.cut(pixel_values.flatten(1)).unsqueeze(0))


class Small(Eye):
    """Takes patches as small images in one row, with their grid."""

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        x = self.cut(pixel_values.reshape(-1, 3, PATCH, PATCH)) if pixel_values.ndim == 4 else pixel_values
        if len(x) != int(grid_thw.prod()):
            raise ValueError("grid")
        return self.through(x.flatten(1).unsqueeze(0))


class Nested(Small):
    """The same, with a dimension for the samples."""

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        if pixel_values.ndim != 5:
            raise ValueError("layout")
        return super().forward(pixel_values[0], grid_thw)


class Merged(Eye):
    """Takes patches that become one token together, with their channels last, and counts tokens."""

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        count, rows, columns, channels = pixel_values.shape
        if count != int(image_grid_thw.prod()) or (rows, columns, channels) != (2 * PATCH, 2 * PATCH, 3):
            raise ValueError("grid")
        cells = pixel_values.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        return self.through(self.cut(cells.flatten(0, 2).flatten(1)).unsqueeze(0))


LAYOUTS: dict[str, type[Eye]] = {
    "sized": Sized, "in pixels": InPixels, "frames": Frames, "flat": Flat, "timed": Timed, "small": Small,
    "nested": Nested, "merged": Merged,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tower_is_found_in_whatever_layout_it_takes_images(name):
    torch.manual_seed(0)
    model = LAYOUTS[name](EyeConfig(name)).eval()
    found = find_backbone(model)
    assert [block.path for block in found.blocks] == ["units.0", "units.1"]
    assert found.patch_embedding == ("cut",)
    assert not found.architecture.video
    if name != "frames":  # a whole video is what others run with

        def runs(images: dict[str, Tensor]) -> bool:
            try:
                model(**images)
            except (ValueError, RuntimeError, TypeError):
                return False
            return True

        assert any(map(runs, images_of(model)))  # also when a model around it is looked at
    adapted = get_peft_model(model, AdaptFormerConfig(r=2, modules_to_save=[]))
    assert sum(p.requires_grad for p in adapted.parameters()) == 8


def test_a_layout_that_nobody_can_guess_is_asked_for():
    class Odd(Eye):
        def forward(self, pixel_values: Tensor, secret: Tensor) -> Tensor:
            return self.through(self.cut(pixel_values).flatten(2).mT + secret.sum())

    model = Odd(EyeConfig()).eval()
    with pytest.raises(BackboneError, match=r"pixel_values, secret.*example_inputs"):
        find_backbone(model)
    given = {"pixel_values": torch.rand(1, 3, 16, 16), "secret": torch.ones(2)}
    assert len(find_backbone(model, example_inputs=given).blocks) == 2


class Sight(nn.Module):
    """Plain, as towers in older models are."""

    def __init__(self) -> None:
        super().__init__()
        self.config = EyeConfig()
        self.cut, self.units = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.ModuleList([Unit(), Unit()])

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.cut(pixel_values).flatten(2).mT
        for unit in self.units:
            x = unit(x)
        return x


class Reader(PreTrainedModel):
    """A language model that reads pictures through a plain tower."""

    config_class = EyeConfig

    def __init__(self, config: EyeConfig):
        super().__init__(config)
        self.words, self.sight = nn.Embedding(9, WIDTH), Sight()
        self.units = nn.ModuleList([Unit(), Unit()])
        self.post_init()

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        x = x if pixel_values is None else torch.cat([x, self.sight(pixel_values)], dim=1)
        for unit in self.units:
            x = unit(x)
        return x


def test_the_plain_tower_of_a_model_that_reads_words_first_is_found():
    found = find_backbone(Reader(EyeConfig()).eval())
    assert found.path == "sight"
    assert found.architecture.grid == "full"


class Joint(PreTrainedModel):
    """One stream of words and patches."""

    config_class = EyeConfig

    def __init__(self, config: EyeConfig):
        super().__init__(config)
        self.words, self.cut = nn.Embedding(9, WIDTH), nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.units = nn.ModuleList([Unit(), Unit()])
        self.optional = config.layout == "optional"
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
        x = self.cut(pixel_values).flatten(2).mT
        if input_ids is not None or not self.optional:
            x = torch.cat([self.words(input_ids), x], dim=1)
        for unit in self.units:
            x = unit(x)
        return x


@pytest.mark.parametrize("layout", ["optional", "needed"])
def test_where_words_stand_beside_patches_no_grid_is_claimed(layout):
    """The number of words differs from text to text, and with it the place of the first patch."""
    found = find_backbone(Joint(EyeConfig(layout)).eval())
    assert [block.path for block in found.blocks] == ["units.0", "units.1"]
    assert found.architecture.grid is None


class Pair(nn.Module):
    """Two towers."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.left, self.right = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_each_of_several_is_asked():
    pair = Pair(Sight).eval()
    with pytest.raises(SeveralError) as caught:
        find_backbone(pair)
    assert caught.value.paths == ("left", "right")
    assert backbones_of(pair) == ("left", "right")
    assert backbones_of(Sight().eval()) == (None,)

    class Closed(Sight):
        def forward(self, pixel_values: Tensor, secret: Tensor) -> Tensor:
            return super().forward(pixel_values) + secret

    with pytest.raises(BackboneError, match="secret"):
        backbones_of(Pair(Closed).eval())


class Grouped(nn.Module):
    """Its parts stand in a module that has only a name."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.down = EyeConfig(), nn.Module()
        self.down.cut, self.down.units = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.ModuleList([Unit(), Unit()])

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.down.cut(pixel_values).flatten(2).mT
        for unit in self.down.units:
            x = unit(x)
        return x


def test_a_part_without_a_forward_is_not_taken_for_the_tower():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eye, self.head = Grouped(), nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.eye(x).mean(1))

    found = find_backbone(Model().eval())
    assert (found.path, found.blocks[0].path) == ("eye", "eye.down.units.0")
