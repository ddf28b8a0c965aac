"""Augmentation of the recipe: what is drawn, from what, and batches that are mixed."""

import argparse
import builtins

import augmentation
import numpy as np
import pytest
import torch
from image_data import Images
from PIL import Image
from recipe_runs import fails, weights
from torch import Tensor


NOTHING = {"vertical_flip": 0.0, "augment": "none", "color_jitter": None, "random_erasing": 0.0}
NOTHING |= {"randaugment_ops": 2, "randaugment_magnitude": 9}
MIX = {"mixup": 0.0, "cutmix": 0.0, "mix_probability": 1.0, "seed": 0}
ALL = [
    "--augment",
    "randaugment",
    "--color_jitter",
    0.3,
    0.3,
    0.3,
    0.1,
    "--vertical_flip",
    0.5,
    "--random_erasing",
    0.5,
]
ALL += ["--mixup", 0.2, "--cutmix", 1.0]


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "flags",
    [
        {"vertical_flip": 0.5},
        {"augment": "randaugment"},
        {"augment": "trivialaugment"},
        {"color_jitter": [0.4]},
        {"color_jitter": [0.0, 0.0, 0.0, 0.5]},
        {"random_erasing": 0.5},
    ],
    ids=str,
)
def test_an_image_is_changed_by_seed_epoch_and_number_alone(flags):
    further = augmentation.Augmentation(argparse.Namespace(**NOTHING | flags))

    def changed(*drawn):
        image = np.asarray(further.image(picture(), drawn))
        return further.pixels(torch.tensor(image).permute(2, 0, 1)[None] / 255, drawn)

    plain = torch.tensor(np.asarray(picture())).permute(2, 0, 1)[None] / 255
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [changed(0, epoch, number) for epoch in range(3) for number in range(4)]
    assert torch.equal(torch.get_rng_state(), state), "the draws of the model are its own"
    torch.manual_seed(6)
    assert all(map(torch.equal, first, [changed(0, epoch, number) for epoch in range(3) for number in range(4)]))
    assert any(not torch.equal(one, plain) for one in first)
    assert len({one.numpy().tobytes() for one in first}) > 1
    assert all(one.shape == plain.shape for one in first)


def test_the_magnitude_is_that_of_randaugment():
    """Magnitude 0 leaves all operations but those without magnitude as they are; a great one changes more."""
    changes = []
    for magnitude in (0, 30):
        flags = {"augment": "randaugment", "randaugment_magnitude": magnitude, "randaugment_ops": 1}
        further = augmentation.Augmentation(argparse.Namespace(**NOTHING | flags))
        images = [np.asarray(further.image(picture(), (0, 0, n)), dtype=float) for n in range(30)]
        changes.append(np.mean([np.abs(image - np.asarray(picture())).mean() for image in images]))
    assert changes[0] < changes[1] / 2


def test_frames_of_a_video_change_alike():
    flags = {"augment": "trivialaugment", "color_jitter": [0.5], "vertical_flip": 0.5, "random_erasing": 1.0}
    further = augmentation.Augmentation(argparse.Namespace(**NOTHING | flags))
    one, two = (np.asarray(further.image(picture(), (0, 1, 2))) for _ in range(2))
    assert np.array_equal(one, two)
    erased = further.pixels(torch.ones(4, 3, 16, 16), (0, 1, 2)) == 0
    assert erased.any()
    assert torch.equal(erased[0], erased[1])


def test_only_training_is_augmented(vit, photos):
    import datasets
    from transformers import AutoImageProcessor

    rows = datasets.load_dataset("imagefolder", data_dir=str(photos / "train"), split="train").select_columns(
        ["image"]
    )
    rows = rows.cast_column("image", datasets.Image(decode=False))
    options = {"seed": 0, "train_crop": "none", "horizontal_flip": 0.0, "clip_frames": None}
    processor, ids = AutoImageProcessor.from_pretrained(vit), np.zeros(len(rows), int)
    pixels = {}
    for split in ("train", "test"):
        for erasing in (0.0, 1.0):
            args = argparse.Namespace(**NOTHING | options | {"random_erasing": erasing})
            pixels[split, erasing] = Images(rows, ids, split, processor, args)[3]["pixel_values"]
    assert torch.equal(pixels["train", 0.0], pixels["test", 0.0])
    assert torch.equal(pixels["test", 0.0], pixels["test", 1.0])
    assert (pixels["train", 1.0] == 0).sum() > (pixels["train", 0.0] == 0).sum()


# --------------------------------------------------------------------------------------------------------- mixing


def mixed(shape=(4, 3, 8, 8), step=0, **flags):
    mixing = augmentation.Mixing(argparse.Namespace(**MIX | flags), 5)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    return pixels, *mixing(pixels.clone(), torch.tensor([0, 1, 2, 4]), (0, step, 0))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 2, 3, 8, 8)], ids=["images", "clips"])
def test_mixup_blends_pixels_and_labels_by_the_same_share(shape):
    pixels, found, shares = mixed(shape, mixup=1.0)
    share = shares[0, 0].item()
    assert 0 < share < 1
    assert type(found) is Tensor
    assert torch.allclose(found, share * pixels + (1 - share) * pixels.roll(1, 0), atol=1e-6)
    expected = torch.eye(5)[[0, 1, 2, 4]]
    assert torch.allclose(shares, share * expected + (1 - share) * expected.roll(1, 0))


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 2, 3, 8, 8)], ids=["images", "clips"])
def test_cutmix_labels_are_the_share_of_pixels(shape):
    for step in range(20):
        pixels, found, shares = mixed(shape, step, cutmix=1.0)
        own = (found == pixels).float().mean().item()
        assert torch.allclose(shares[0, 0], torch.tensor(own), atol=1e-6)
        assert torch.equal(torch.where(found == pixels, pixels, pixels.roll(1, 0)), found)


def test_mixing_is_drawn_from_seed_and_batch_alone():
    one, two = mixed(step=3, mixup=0.4, cutmix=1.0), mixed(step=3, mixup=0.4, cutmix=1.0)
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[1], mixed(step=4, mixup=0.4, cutmix=1.0)[1])
    kinds = set()
    for step in range(30):
        pixels, found, _ = mixed(step=step, mixup=1.0, cutmix=1.0)
        kinds.add(bool(((found == pixels) | (found == pixels.roll(1, 0))).all()))
    assert kinds == {True, False}, "each batch gets one of the two"
    plain = [mixed(step=step, mixup=1.0, mix_probability=0.5)[2].ndim for step in range(30)]
    assert 5 < plain.count(1) < 25
    assert mixed()[2].ndim == 1


def test_everything_together_resumes_bit_for_bit_with_other_workers(run, capsys):
    flags = [*ALL, "--checkpointing_steps", 4, "--select", "last", "--save_total_limit", 9]
    whole = run(*flags, output="whole")
    resume = ["--resume_from_checkpoint", str(whole.output / "checkpoint-4"), "--dataloader_num_workers", 1]
    assert weights(run(*flags, *resume, output="resumed").output) == weights(whole.output)
    other = run(*flags[: flags.index("--mixup")], *flags[flags.index("--cutmix") + 2 :], output="other")
    assert weights(other.output) != weights(whole.output)


def test_views_of_cached_features_hold_the_augmentation(run, tmp_path):
    flags = [
        "--augment",
        "trivialaugment",
        "--random_erasing",
        0.5,
        "--vertical_flip",
        0.5,
        "--checkpointing_steps",
        "no",
    ]
    plain = run(*flags, method="linear", output="plain").results
    cached = ["--cache_features", tmp_path / "features", "--cache_views", 2]
    found = run(*flags, *cached, method="linear", output="cached").results
    assert found["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-6)
    run(*cached, "--checkpointing_steps", "no", method="linear", output="other")
    assert len(list(tmp_path.glob("features/train-*"))) == 2, "other augmentation is another cache"


def test_patches_are_not_taken_for_images():
    further = augmentation.Augmentation(argparse.Namespace(**NOTHING | {"random_erasing": 1.0}))
    with pytest.raises(ValueError, match="--random_erasing needs images, but this image processor cuts patches"):
        further.pixels(torch.zeros(1, 16, 48), (0, 0, 0))
    with pytest.raises(ValueError, match="--mixup or --cutmix needs images"):
        mixed((4, 16, 48), mixup=1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vertical_flip", 2], "--vertical_flip must be between 0 and 1, got 2.0"),
        (["--random_erasing", 1.5], "--random_erasing must be between 0 and 1"),
        (["--randaugment_magnitude", 31], "--randaugment_magnitude must be from 0 to 30, got 31"),
        (["--color_jitter", 0.1, 0.2], "--color_jitter takes 1, 3 or 4 values, got 2"),
        (["--color_jitter", 0.1, 0.2, 0.3, 0.6], "the hue (the fourth value) must be 0.5 or less"),
        (["--augment", "autoaugment"], "--augment: invalid choice: 'autoaugment'"),
        (["--mixup", -1], "argument --mixup: must be 0 or greater"),
        (["--mixup", 0.2, "--cache_features", "f"], "--mixup does not work with --cache_features"),
        (["--cutmix", 1, "--cache_features", "f", "--cache_views", 2], "--cutmix does not work with --cache_features"),
        (
            ["--vertical_flip", 0.5, "--cache_features", "f", "--train_crop", "none", "--horizontal_flip", 0],
            "--cache_views",
        ),
    ],
)
def test_what_cannot_be_is_refused(run, capsys, flags, message):
    assert message in " ".join(fails(capsys, run, *map(str, flags), method="linear").split())


@pytest.mark.parametrize(
    "flag", ["--augment trivialaugment", "--color_jitter 0.2", "--random_erasing 0.2", "--cutmix 1"]
)
def test_without_torchvision_the_flag_is_refused_by_name(run, capsys, monkeypatch, flag):
    ordinary = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    name = flag.split()[0]
    assert f"{name} needs torchvision, which is not installed: pip install torchvision" in fails(
        capsys, run, *flag.split()
    )
