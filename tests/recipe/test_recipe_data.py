"""The data of the recipe: data sets, pixels, clips, and what is wrong with them."""

import json
import shutil
from types import SimpleNamespace

import datasets
import image_data
import numpy as np
import pytest
import torch
from PIL import Image
from recipe_runs import fails, paint
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTImageProcessor,
)


def test_saved_data_sets_and_slices(run, photos, tmp_path, capsys):
    rows = datasets.load_dataset("imagefolder", data_files={"train": str(photos / "train" / "**")})
    for name, saved in (("dict", rows), ("one", rows["train"])):
        saved.save_to_disk(tmp_path / name)
        run("--max_train_steps", 1, data=["--dataset_name", str(tmp_path / name)], output=f"from-{name}")
        assert "19 train, 3 validation images" in capsys.readouterr().out
    sliced = ["--dataset_name", str(photos), "--train_split", "train[:80%]", "--validation_split", "train[80%:]"]
    run("--max_train_steps", 1, "--test_split", "none", data=sliced, output="slices")
    assert "18 train, 4 validation images" in capsys.readouterr().out


def test_number_of_samples_is_limited_at_random(run, capsys):
    run("--max_train_steps", 1, "--max_train_samples", 9, "--max_eval_samples", 4)
    assert "9 train, 4 validation, 4 test images of 3 classes" in capsys.readouterr().out


def test_pixels(photos):
    rows = datasets.load_dataset("imagefolder", data_files={"train": str(photos / "train" / "**")}, split="train")
    rows = rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})

    def images(split="train", **changes):
        args = {"seed": 1, "train_crop": "random_resized", "crop_scale": 0.08, "horizontal_flip": 0.5}
        args |= {"clip_frames": None, **changes}
        return image_data.Images(rows, np.zeros(len(rows), int), split, processor, SimpleNamespace(**args))

    plain = processor(images=Image.open(rows[3]["image"]["path"]), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(images("test")[3]["pixel_values"], plain)
    assert torch.equal(images(train_crop="none", horizontal_flip=0)[3]["pixel_values"], plain)
    assert torch.equal(images(train_crop="none", horizontal_flip=1)[3]["pixel_values"], plain.flip(-1))
    for crop in image_data.CROPS:
        augmented = images(train_crop=crop)
        first = [augmented[i]["pixel_values"] for i in range(22)]
        assert all(pixels.shape == (3, 32, 32) for pixels in first)
        assert all(torch.equal(a, augmented[i]["pixel_values"]) for i, a in enumerate(first)), "no hidden state"
        augmented.epoch = 1
        assert not all(torch.equal(a, augmented[i]["pixel_values"]) for i, a in enumerate(first))


def test_each_epoch_crops_every_image_anew(run, monkeypatch):
    boxes = []
    resize = Image.Image.resize

    def watched(self, size, resample=None, box=None, **kwargs):
        boxes.append(box)
        return resize(self, size, resample, box, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    run()
    crops = [box for box in boxes if box is not None]
    assert len(crops) == len(set(crops)) == 2 * 22


def test_data_set_without_labels_lists_its_columns(run, photos, tmp_path):
    for number in range(3):
        paint(tmp_path / "flat" / f"{number}.png", 0, np.random.default_rng(number))
    with pytest.raises(ValueError, match=r"flat has images \(0\.png, 1\.png, 2\.png\) and no class folders"):
        run(data=["--train_dir", str(tmp_path / "flat")])
    with pytest.raises(ValueError, match=r"no label column 'colour'.* among image \(Image\), label \(ClassLabel\)"):
        run("--label_column_name", "colour")
    with pytest.raises(ValueError, match=r"no image column 'photo'.* --image_column_name"):
        run("--image_column_name", "photo")


def test_unlabelled_and_unknown_classes_are_named(run, photos, tmp_path):
    for split, labels in {"train": [0, 1, 0, 1], "test": [-1, -1], "odd": [0, 2]}.items():
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["a", "b", "c"][: 3 if split == "odd" else 2]),
            }
        )
        images = [str(photos / "train" / "red" / "0.png")] * len(labels)
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    train = ["--train_file", str(tmp_path / "train.parquet"), "--select", "last", "--max_train_steps", "1"]
    with pytest.raises(ValueError, match=r"test split has 2 samples without label.* --test_split none leaves"):
        run(data=[*train, "--test_file", str(tmp_path / "test.parquet")])
    run(data=[*train, "--test_file", str(tmp_path / "test.parquet"), "--test_split", "none"])
    with pytest.raises(ValueError, match=r"Class 'c' of the test split is not in the training split: \['a', 'b'\]"):
        run("--overwrite_output_dir", data=[*train, "--test_file", str(tmp_path / "odd.parquet")])


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_corrupt_image_is_named_or_skipped_and_counted(run, photos, tmp_path, damage):
    for split in ("train", "test"):
        shutil.copytree(photos / split, tmp_path / "data" / split)
    bad = tmp_path / "data" / "test" / "green" / "1.png"
    bad.write_bytes({"truncated": bad.read_bytes()[:-700], "text": b"not an image", "empty": b""}[damage])
    data = [w for split in ("train", "test") for w in (f"--{split}_dir", str(tmp_path / "data" / split))]
    with pytest.raises(
        image_data.CorruptImageError, match=r"Cannot decode .*test/green/1\.png .*1 such images in all"
    ):
        run(data=data)
    assert not (tmp_path / "out").exists(), "found before anything was trained"
    with pytest.raises(
        image_data.CorruptImageError, match=r"Cannot decode .*test/green/1\.png \(sample \d+ of the test"
    ):
        run("--check_images", "false", "--max_train_steps", 1, data=data, output="unchecked")
    assert (tmp_path / "unchecked" / "adapter_model.safetensors").exists(), "the training is not lost"
    done = run("--skip_corrupt_images", data=data, output="skipped")
    assert done.results["skipped_images"] == 1
    base = tmp_path / "base"
    bad.unlink()
    clean = run(data=data, output=base.name)
    assert clean.results["test_loss"] == done.results["test_loss"]


def test_corrupt_image_within_a_parquet_file(run, photos, tmp_path):
    paths = sorted((photos / "train").glob("*/*.png"))
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name} for path in paths]
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][:100]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    data = ["--train_file", str(tmp_path / "train.parquet")]
    with pytest.raises(image_data.CorruptImageError, match=rf"Cannot decode {paths[5].name} \(sample \d+ of the"):
        run(data=data)
    done = run("--skip_corrupt_images", "--max_train_steps", 1, data=data, output="skipped")
    assert done.results["skipped_images"] == 1
    config = json.loads((done.output / "checkpoint-1" / "progress.json").read_text())
    assert config["run"]["classes"] == ["blue", "green", "red"], "text labels are classes in alphabetical order"


def other_processor(folder):
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder / "other")
    return folder / "other"


def test_data_errors(run, photos, tmp_path):
    with pytest.raises(ValueError, match="--top_k 4: there are 3 classes"):
        run("--top_k", 4)
    with pytest.raises(
        ValueError, match=r"--validation_split dev: the data set has the splits train, validation, test"
    ):
        run("--validation_split", "dev")
    train = ["--train_dir", str(photos / "train")]
    with pytest.raises(ValueError, match=r"--test_split test: the data set has the splits train\."):
        run("--test_split", "test", data=train)
    done = run("--image_processor_name", str(other_processor(tmp_path)), "--max_train_steps", 1, output="other")
    assert list(AutoImageProcessor.from_pretrained(done.output).image_mean) == [0.1, 0.2, 0.3]


def test_videos_reach_the_model_as_lists_of_frames(run, clips):
    done = run("--clip_frames", 3, "--num_frames", 3, method="aim", data=["--dataset_name", str(clips)])
    model = AutoModelForImageClassification.from_pretrained(done.output)
    assert model.peft_config["default"].num_frames == 3
    processor = ViTImageProcessor.from_pretrained(done.output)
    hits = []
    for row in datasets.load_from_disk(clips)["test"]:
        length = len(row["frames"])
        middle = [row["frames"][int(length * (2 * part + 1) / 6)] for part in range(3)]
        pixels = processor(images=middle, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            hits.append(model.eval()(pixel_values=pixels[None]).logits.argmax().item() == row["label"])
    assert done.results["test_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_frames_of_a_clip_get_the_same_crop_and_come_from_all_its_parts(clips, run, monkeypatch):
    seen = []
    real = image_data.Images.crop

    def crop(self, image, rng):
        seen.append((image.getpixel((0, 0))[0] // 20, rng.bit_generator.state["state"]["state"]))
        return real(self, image, rng)

    monkeypatch.setattr(image_data.Images, "crop", crop)
    run("--clip_frames", 3, "--max_train_steps", 1, method="stadapter", data=["--dataset_name", str(clips)])
    assert len(seen) >= 12
    for start in range(0, 12, 3):
        shades, draws = zip(*seen[start : start + 3], strict=True)
        assert len(set(shades)) == 3
        assert list(shades) in (sorted(shades), sorted(shades, reverse=True))
        assert len(set(draws)) == 1
    assert len({draws for _, draws in seen[:12]}) == 4


def test_bad_clips(run, clips, tmp_path, capsys):
    flags = ("--clip_frames", 2, "--max_train_steps", 1)
    with pytest.raises(ValueError, match="--clip_frames: the column 'image' must hold lists of images"):
        run(*flags, method="aim")
    broken = datasets.load_from_disk(clips)
    rows = broken["train"].cast_column("frames", datasets.List(datasets.Image(decode=False))).to_list()
    rows[5]["frames"][1]["bytes"] = b"no image"
    rows[6]["frames"] = []
    broken["train"] = datasets.Dataset.from_list(rows).cast(broken["train"].features)
    broken.save_to_disk(tmp_path / "broken")
    data = ["--dataset_name", str(tmp_path / "broken")]
    with pytest.raises(ValueError, match="sample 5 of the train split, 2 such images in all"):
        run(*flags, method="aim", data=data)
    run(*flags, "--skip_corrupt_images", method="aim", data=data, output="skipped")
    assert "2 corrupt ones skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--trust_remote_code"],
            "--trust_remote_code: code that comes with a data set or a checkpoint is not run here",
        ),
        (["--trust_remote_code", "true"], "refs/convert/parquet"),
        (["--train_split", "none"], "--train_split none: training needs samples; name a split"),
        (["--train_file", "x.csv"], "one of --dataset_name, --train_dir and --train_file is needed, got 2"),
        (["--dataset_name", "x"], "one of --dataset_name, --train_dir and --train_file is needed, got 2"),
    ],
)
def test_flags_of_the_data_that_are_refused(run, capsys, flags, message):
    assert message in fails(capsys, run, *flags)


def test_tokens_and_folder_of_what_is_downloaded(run, photos, tmp_path, monkeypatch):
    """The token of the data goes to the data, the other one to the rest, and neither into any file."""
    seen = []
    real = datasets.load_dataset

    def watched(name, *rest, **given):
        seen.append((given["token"], given["cache_dir"]))
        given["token"] = None
        return real(str(photos), *rest, **given)

    monkeypatch.setattr("image_sources.datasets.load_dataset", watched)
    flags = ("--max_train_steps", 1, "--cache_dir", tmp_path / "cache", "--token", "hf_one")
    for more, token in (((), "hf_one"), (("--data_token", "hf_two"), "hf_two")):
        done = run(*flags, *more, data=["--dataset_name", "me/photos"], output=f"out{len(more)}")
        assert seen.pop() == (token, str(tmp_path / "cache"))
        texts = [path.read_bytes() for path in done.output.rglob("*") if path.is_file()]
        assert not any(secret in text for text in texts for secret in (b"hf_one", b"hf_two"))
