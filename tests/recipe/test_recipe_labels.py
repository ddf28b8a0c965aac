"""Sources, labels and pixels of the recipe's data, without a model."""

import argparse
import json

import datasets
import image_data
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labels import (
    BalancedSampler,
    Loss,
    class_ids,
    class_names,
    class_table,
    class_weights,
    find_label_columns,
    hold_out,
    read_labels,
)
from PIL import Image
from recipe_runs import data_args, load, paint


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(12):
        paint(folder / "img" / f"{number}.png", number % 3, rng)
    return folder


def table(pictures, name, labels, **more):
    """A table of images, relative to itself, and labels."""
    rows = [{"image": f"img/{number}.png", "label": label} for number, label in enumerate(labels)]
    for key, values in more.items():
        for row, value in zip(rows, values, strict=True):
            row[key] = value
    file = pictures / name
    if file.suffix in (".csv", ".tsv", ".CSV"):
        sep = "\t" if file.suffix == ".tsv" else ","
        lines = [sep.join(rows[0]), *(sep.join("" if v is None else str(v) for v in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def labels_of(data, columns=None):
    rows, declared = read_labels(data, find_label_columns(data, columns))
    return rows, class_names(rows, declared)


# ------------------------------------------------------------------------------------------------------- sources


def test_each_split_has_its_own_source(pictures, tmp_path):
    train = table(pictures, "mine.csv", ["a", "b", "a", "b"])
    for name in "ab":
        paint(tmp_path / "test" / name / "1.png", 0, np.random.default_rng(0))
    load(train_file=train)["train"].to_parquet(tmp_path / "hub.parquet")
    whole = datasets.DatasetDict({s: load(train_file=train)["train"] for s in ("train", "validation", "test")})
    whole.save_to_disk(tmp_path / "saved")
    found = load(dataset_name=str(tmp_path / "saved"), test_dir=tmp_path / "test", validation_file=str(train))
    assert {split: len(data) for split, data in found.items()} == {"train": 4, "validation": 4, "test": 2}
    assert find_label_columns(found["test"], None) == ["label"]
    for flag, message in [("test_dir", "there is no such folder"), ("validation_file", "there is no such file")]:
        with pytest.raises(ValueError, match=rf"--{flag} {tmp_path}/nowhere\.csv: {message}"):
            load(dataset_name=str(tmp_path / "saved"), **{flag: tmp_path / "nowhere.csv"})
    with pytest.raises(ValueError, match=r"--test_dir .*test and --test_file .*mine\.csv: give only one for test"):
        load(train_file=train, test_dir=tmp_path / "test", test_file=train)
    with pytest.raises(ValueError, match=r"No split reads --test_dir .*test: remove it or --test_split"):
        load(train_file=train, test_dir=tmp_path / "test", test_split="train[:2]")
    with pytest.raises(ValueError, match=r"No split reads --validation_file .*mine\.csv"):
        load(train_file=train, validation_file=train, validation_split="train[:2]")
    assert list(load(train_file=train, test_dir=tmp_path / "nowhere", test_split="none")) == ["train"]


def test_slices_of_any_source(pictures, capsys):
    train = table(pictures, "slices.csv", list("ababab"))
    found = load(train_file=train, train_split="train[2:]", test_split="train[:2]", validation_split="train[:50%]")
    assert {split: len(data) for split, data in found.items()} == {"train": 4, "validation": 3, "test": 2}
    assert "Samples of validation that are also in train, because of --validation_split and --train_split: 1." in (
        capsys.readouterr().out
    )
    for spec, message in [
        ("dev", r"the data set has the splits train\. There is no dev"),
        ("train[:1]+dev[:2]", "There is no dev"),
        ("train[a:b]", r"write a slice as train\[:800\]"),
        ("train[3:3]", r"takes no sample of train \(6\)"),
        ("train[4:2]", r"takes no sample of train \(6\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(train_file=train, test_split=spec)


@pytest.mark.parametrize("name", ["table.txt", "table.xlsx", "noname", "table.csv.gz"])
def test_files_of_other_formats_are_named(tmp_path, name):
    (tmp_path / name).write_text("image,label\n")
    with pytest.raises(ValueError, match=rf"--train_file .*{name}: the suffix .* valid are \.parquet, \.csv, \.tsv"):
        load(train_file=tmp_path / name)


@pytest.mark.parametrize("name", ["t.tsv", "t.CSV", "t.jsonl", "t.json"])
def test_tables_of_any_format(pictures, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are relative to the table
    data = load(train_file=table(pictures, name, list("aba")))["train"]
    assert labels_of(data) == (["a", "b", "a"], ["a", "b"])
    assert np.array_equal(data[2]["image"], Image.open(pictures / "img" / "2.png"))


def test_images_by_a_struct_with_their_path(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (pictures / "struct.jsonl").write_text('{"image": {"path": "img/1.png"}, "label": "a"}\n')
    data = load(train_file=pictures / "struct.jsonl")["train"]
    assert np.array_equal(data[0]["image"], Image.open(pictures / "img" / "1.png"))


def test_tables_in_several_folders(tmp_path):
    for name in "ab":
        paint(tmp_path / name / "img" / "0.png", "ab".index(name), np.random.default_rng(0))
        table(tmp_path / name, "t.csv", [name])
    data = load(train_file=str(tmp_path / "*" / "t.csv"))["train"]
    assert labels_of(data)[0] == ["a", "b"]
    for number, name in enumerate("ab"):
        assert np.array_equal(data[number]["image"], Image.open(tmp_path / name / "img" / "0.png"))


def test_tables_that_hold_nothing(tmp_path):
    (tmp_path / "empty.csv").write_text("image,label\n")
    for name in ("bad.json", "bad.tar", "bad.parquet"):
        (tmp_path / name).write_text("{not json")
    (tmp_path / "bad.csv").write_bytes("image,label\n1.png,é\n".encode("latin-1"))
    bad = [("bad.json", "json"), ("bad.tar", "webdataset"), ("bad.parquet", "parquet"), ("bad.csv", "csv")]
    for name, message in [("empty.csv", "has no rows"), *((name, f"cannot be read as {kind}") for name, kind in bad)]:
        with pytest.raises(ValueError, match=rf"--train_file .*{name} {message}"):
            load(train_file=tmp_path / name)
    with pytest.raises(ValueError, match=r"--train_file .* is a folder: give it by --train_dir\."):
        load(train_file=tmp_path)


def test_webdataset(pictures, tmp_path):
    import tarfile

    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                tar.add(pictures / "img" / f"{number}.png", f"{number:04}.png")
                (tmp_path / "cls").write_text(str(number % 2))
                tar.add(tmp_path / "cls", f"{number:04}.cls")
    data = load(train_file=str(tmp_path / "shard-*.tar"))["train"]
    assert labels_of(data) == (["0", "1", "0", "1", "0", "1"], ["0", "1"])
    assert np.array_equal(data[5]["png"], Image.open(pictures / "img" / "5.png"))
    with pytest.raises(ValueError, match=r"none-\*\.tar: there is no such file"):
        load(train_file=str(tmp_path / "none-*.tar"))


def test_metadata_beside_images(pictures, tmp_path, capsys):
    for number in range(3):
        paint(tmp_path / "all" / f"{number}.png", 0, np.random.default_rng(number))
    (tmp_path / "all" / "metadata.csv").write_text("file_name,label\n0.png,NA\n1.png,b\n")
    data = load(train_dir=tmp_path / "all")["train"]
    assert labels_of(data) == (["NA", "b"], ["NA", "b"])
    assert np.array_equal(data[1]["image"], Image.open(tmp_path / "all" / "1.png"))
    assert "there are 3 images, but metadata.csv names 2" in capsys.readouterr().out
    for name in "ab":
        paint(tmp_path / "cap" / name / "1.png", 0, np.random.default_rng(0))
    (tmp_path / "cap" / "metadata.csv").write_text("file_name,text\na/1.png,an a\nb/1.png,a b\n")
    with pytest.raises(
        ValueError, match=r"metadata\.csv is read instead of the names of folders \(a, b\).* no column 'label'"
    ):
        load(train_dir=tmp_path / "cap")
    assert labels_of(load(train_dir=tmp_path / "cap", label_column_name=["text"])["train"], ["text"])[1] == [
        "a b",
        "an a",
    ]


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["NA", "None", "nan", "null", "N/A"], ["N/A", "NA", "None", "nan", "null"]),
        (["007", "7", "07"], ["007", "07", "7"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["red", "red ", " red", "blue"], ["blue", "red"]),
        (["e\u0301", "é", "z"], ["z", "é"]),
        (["True", "False"], ["False", "True"]),
        (["1.5", "2.5"], ["1.5", "2.5"]),
    ],
)
def test_text_of_a_table_is_a_class_as_it_stands(pictures, given, names):
    data = load(train_file=table(pictures, "text.csv", given))["train"]
    assert labels_of(data)[1] == names


@pytest.mark.parametrize(
    ("name", "values", "missing"),
    [
        ("m.csv", ["a", "", "b", "  ", "a"], "2 samples without label: numbers 1, 3"),
        ("m.jsonl", ["a", None, "b", "\t", None], "3 samples without label: numbers 1, 3, 4"),
        ("n.jsonl", [1, None, 2, 3, 4], "1 samples without label: numbers 1"),
        ("o.jsonl", [None] * 9 + [1], "9 samples without label: numbers 0, 1, 2, 3, 4 and 4 more"),
    ],
)
def test_samples_without_label_are_counted_and_numbered(pictures, name, values, missing):
    rows, names = labels_of(load(train_file=table(pictures, name, values))["train"])
    with pytest.raises(ValueError, match=f"The train split has {missing}. Label them or take them out"):
        class_ids(rows, "train", names, several=False)
    with pytest.raises(ValueError, match=f"The test split has {missing}. --test_split none leaves the split out"):
        class_ids(rows, "test", names, several=False)


def features(feature):
    return datasets.Features({"label": feature})


@pytest.mark.parametrize(
    ("feature", "rows", "names", "expected"),
    [
        (
            datasets.List(datasets.Value("string")),
            [["b", "a "], [], ["c"]],
            ["a", "b", "c"],
            [[1, 1, 0], [0, 0, 0], [0, 0, 1]],
        ),
        (
            datasets.List(datasets.ClassLabel(names=["y", "x", "z"])),
            [[0, 2], [1]],
            ["y", "x", "z"],
            [[1, 0, 1], [0, 1, 0]],
        ),
        (datasets.List(datasets.Value("int64")), [[10, 2], [2, 3]], ["2", "3", "10"], [[1, 0, 1], [1, 1, 0]]),
        (datasets.List(datasets.Value("int64")), [[0, 1, 1], [0, 0, 1]], ["0", "1", "2"], [[0, 1, 1], [0, 0, 1]]),
        (datasets.List(datasets.Value("int64"), length=2), [[0, 1], [1, 0]], ["0", "1"], [[0, 1], [1, 0]]),
        (datasets.List(datasets.Value("float32")), [[0, 1], [1, 1]], ["0", "1"], [[0, 1], [1, 1]]),
        (datasets.List(datasets.Value("bool")), [[True, False]], ["0", "1"], [[1, 0]]),
    ],
)
def test_several_classes_a_sample_from_lists(feature, rows, names, expected):
    data = datasets.Dataset.from_dict({"label": rows}, features=features(feature))
    found, known = labels_of(data)
    assert known == names
    assert class_ids(found, "train", known, several=True).tolist() == expected


def test_several_classes_a_sample_from_columns(pictures):
    file = table(pictures, "bits.csv", ["x"] * 3, cat=[1, 0, 0], dog=["true", "False", "0"], owl=["1.0", "0", "1"])
    data = load(train_file=file, label_column_name=["cat", "dog", "owl"])["train"]
    rows, names = labels_of(data, ["cat", "dog", "owl"])
    assert class_ids(rows, "train", names, several=True).tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    for values, message in [((1, 2, 0), "sample 1 has 2"), ((1, "yes", 0), "sample 1 has 'yes'")]:
        data = datasets.Dataset.from_dict(
            {"cat": [str(v) if message[-1] == "'" else v for v in values], "dog": [0, 0, 1]}
        )
        with pytest.raises(ValueError, match=rf"--label_column_name cat, dog: {message}; columns .* hold 0 or 1"):
            read_labels(data, ["cat", "dog"])
    rows, _ = read_labels(datasets.Dataset.from_dict({"cat": [1, None], "dog": [0, 1]}), ["cat", "dog"])
    with pytest.raises(ValueError, match="1 samples without label: numbers 1"):
        class_ids(rows, "train", ["cat", "dog"], several=True)


def test_labels_that_are_refused():
    for feature, values in [("float32", [0.5, None]), ("binary", [b"a", b"b"])]:
        data = datasets.Dataset.from_dict({"label": values}, features=features(datasets.Value(feature)))
        with pytest.raises(ValueError, match="--label_column_name label: labels must be class names or whole numbers"):
            read_labels(data, ["label"])
    with pytest.raises(
        ValueError, match="Class 'c' of the test split is not in the training split: .'a', 'b'.*sample 1"
    ):
        class_ids(["a", "c"], "test", ["a", "b"], several=False)
    for rows, several in [([["a"]], False), (["a"], True)]:
        with pytest.raises(ValueError, match="The labels of train are .*, those of test "):
            class_ids(rows, "test", ["a", "b"], several=several)
    data = datasets.Dataset.from_dict({"image": ["x"], "kind": ["a"]})
    for given in (None, ["colour"], ["kind", "colour"]):
        with pytest.raises(ValueError, match=r"choose with --label_column_name among image \(Value\), kind \(Value\)"):
            find_label_columns(data, given)


@pytest.mark.parametrize("share", [0.01, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("several", [False, True])
def test_every_class_with_two_samples_is_in_both_parts(share, several):
    ids = np.repeat([0, 1, 2, 3], [60, 3, 2, 1])
    given = np.eye(4, dtype=np.float32)[ids] if several else ids
    kept, held = hold_out(given, share, seed=3)
    assert sorted([*kept, *held]) == list(range(66))
    assert set(ids[kept]) == {0, 1, 2, 3}
    assert set(ids[held]) == {0, 1, 2}
    assert abs((ids[held] == 0).sum() - share * 60) <= 1


def test_shares_that_leave_nothing():
    for ids, share in [(np.arange(3), 0.5), (np.repeat([0, 1], 4), 1.0)]:
        with pytest.raises(ValueError, match=rf"--train_val_split {share} puts \d of the \d samples into validation"):
            hold_out(ids, share, 0)


def test_classes_are_shown_with_their_counts():
    shown = class_table({"train": np.array([0, 0, 2]), "test": np.array([1])}, ["a", "long name", "c"])
    assert [line.split() for line in shown.splitlines()[:4]] == [
        ["class", "train", "test"], ["a", "2", "0"], ["long", "name", "0", "1"], ["c", "1", "0"]
    ]  # fmt: skip
    assert "train has no sample of long name." in shown
    assert "test has no sample of a, c." in shown
    many = class_table({"train": np.repeat(np.arange(100), np.arange(100) + 1)}, [f"c{n}" for n in range(100)])
    assert "and 70 more classes; in train, c0 has fewest (1) and c99 most (100)" in many
    assert "c50" not in many


# ------------------------------------------------------------------------------------------- weights and sampling


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    ids = np.repeat([0, 1, 3], [7, 2, 1])
    weights = class_weights(["balanced"], ids, list("abcd")).numpy()
    assert weights[[0, 1, 3]] == pytest.approx(compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=ids))
    assert weights[2] == 0
    assert weights[ids].mean() == pytest.approx(1)
    assert class_weights(["b=2", "d=0.5"], ids, list("abcd")).tolist() == [1, 2, 1, 0.5]
    assert class_weights(None, ids, list("abcd")) is None
    tags = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=np.float32)
    assert class_weights(["balanced"], tags, list("abc")).tolist() == [3, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["balance"], "balance: write balanced, or CLASS=NUMBER. Classes: red, blue"),
        (["rde=2"], "rde=2: write balanced, or CLASS=NUMBER. Did you mean 'red'?"),
        (["red=much"], "red=much: 'much' is not a number"),
        (["red=-1"], "red=-1: weights must be 0 or greater"),
        (["red=nan"], "red=nan: weights must be 0 or greater"),
        (["red=0", "blue=0"], "red=0 blue=0: weights must be 0 or greater, and at least one above 0"),
    ],
)
def test_bad_weights(given, message):
    with pytest.raises(ValueError, match=f"--class_weights {message}"):
        class_weights(given, np.array([0, 1]), ["red", "blue"])


def test_loss_with_weights_does_not_depend_on_the_parts_of_a_batch():
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(12, 3), torch.randint(3, (12,)), torch.tensor([0.5, 2.0, 1.0])
    loss = Loss(weights)
    by_hand = sum(-weights[y] * row.log_softmax(0)[y] for row, y in zip(logits, labels, strict=True)) / 12
    assert loss(logits, labels) == pytest.approx(by_hand)
    assert torch.stack([loss(logits[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]).mean() == pytest.approx(
        by_hand
    )
    assert loss(logits, F.one_hot(labels, 3).float()) == pytest.approx(by_hand), "mixed labels"
    assert torch.equal(loss.samples(logits, labels), F.cross_entropy(logits, labels, reduction="none"))
    smooth = Loss(None, smoothing=0.2)
    assert torch.equal(smooth(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.2))


def test_loss_of_several_classes():
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(5, 3), torch.randint(2, (5, 3)).float(), torch.tensor([0.5, 2.0, 1.0])
    p = logits.sigmoid()
    by_hand = -(weights * labels * p.log() + (1 - labels) * (1 - p).log())
    assert Loss(weights, several=True)(logits, labels) == pytest.approx(by_hand.mean().item())
    plain = -(labels * p.log() + (1 - labels) * (1 - p).log())
    torch.testing.assert_close(Loss(weights, several=True).samples(logits, labels), plain.mean(1))


def test_balanced_draws():
    ids = np.repeat([0, 2, 3], [900, 90, 10])
    sampler = BalancedSampler(ids, seed=4)
    drawn = list(sampler)
    assert drawn == list(BalancedSampler(ids, seed=4)), "from the seed alone"
    assert len(drawn) == len(set(drawn)) == 1000, "a sample that comes again has another number"
    counts = np.bincount(ids[np.array(drawn) % 1000])
    assert counts[1] == 0
    assert all(abs(counts[label] - 1000 / 3) < 60 for label in (0, 2, 3))
    sampler.set_epoch(1)
    assert list(sampler) != drawn
    assert list(BalancedSampler(ids, seed=5)) != drawn
    plain = list(BalancedSampler(ids, seed=4, again=False))
    assert plain == [number % 1000 for number in drawn]
    assert set(plain) >= set(range(990, 1000)), "every sample of the rarest class comes, each many times"


def test_processes_share_balanced_draws():
    from accelerate.data_loader import BatchSamplerShard

    ids = np.repeat([0, 1], [30, 2])
    parts = []
    for process in range(2):
        sampler = BalancedSampler(ids, seed=4)
        sampler.set_epoch(3)
        batches = torch.utils.data.BatchSampler(sampler, 4, drop_last=False)
        parts.append([number for batch in BatchSamplerShard(batches, 2, process) for number in batch])
    whole = BalancedSampler(ids, seed=4)
    whole.set_epoch(3)
    assert sorted(parts[0] + parts[1]) == sorted(whole)


# -------------------------------------------------------------------------------------------------------- pixels


def decoded(path):
    return np.asarray(image_data.decode({"path": str(path), "bytes": None}, "here"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4"])
def test_16_bits_are_scaled(tmp_path, suffix, kind):
    values = np.array([[0, 255, 256, 12345], [40000, 65280, 65535, 1000]]).astype(kind)
    if suffix == "png" and kind == "<i4":
        pytest.skip("no 32 bits in PNG")
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    grey = (values >> 8).astype(np.uint8)
    assert np.array_equal(decoded(tmp_path / f"x.{suffix}"), np.stack([grey] * 3, -1))


def test_8_bits_stay(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.array_equal(decoded(tmp_path / "x.png")[..., 0], values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), "floating-point pixels"),
        (np.full((4, 4), 70000, dtype=np.int32), "32-bit pixels from 70000 to 70000"),
        (np.full((4, 4), -1, dtype=np.int32), "32-bit pixels from -1 to -1"),
    ],
)
def test_pixels_without_a_known_range_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(image_data.CorruptImageError, match=rf"Cannot decode .*x\.tif \(here\): {message}"):
        decoded(tmp_path / "x.tif")


def test_a_repaired_image_counts_and_a_broken_one_does_not(pictures, tmp_path, capsys):
    for number in range(4):
        paint(tmp_path / "img" / f"{number}.png", 0, np.random.default_rng(number))
    file = table(tmp_path, "t.csv", list("abab"))
    whole = (tmp_path / "img" / "2.png").read_bytes()

    def usable(**given):
        args = data_args(train_file=file, check_images=True, dataloader_num_workers=0, **given)
        data = (
            load(train_file=file)["train"].select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        )
        return image_data.usable_rows(data, "train", args).tolist()

    (tmp_path / "img" / "2.png").write_bytes(whole[:60])
    with pytest.raises(
        image_data.CorruptImageError, match=r"2\.png \(sample 2 of the train split, 1 such images in all"
    ):
        usable(skip_corrupt_images=False)
    assert usable(skip_corrupt_images=True) == [0, 1, 3]
    assert "1 left out. Cannot decode" in capsys.readouterr().out
    (tmp_path / "img" / "2.png").write_bytes(whole)
    assert usable(skip_corrupt_images=False) == usable(skip_corrupt_images=True) == [0, 1, 2, 3]
    (tmp_path / "img" / "0.png").unlink()
    assert usable(skip_corrupt_images=True) == [1, 2, 3]
    with pytest.raises(image_data.CorruptImageError, match=r"0\.png \(sample 0"):
        usable(skip_corrupt_images=False)


def test_splits_of_other_sources_have_their_own_columns(pictures, tmp_path):
    data = load(train_file=table(pictures, "cols.csv", list("abab")))["train"].rename_column("label", "kind")
    data.to_parquet(tmp_path / "train.parquet")
    for name in "ab":
        paint(tmp_path / "test" / name / "1.png", 0, np.random.default_rng(0))
    args = data_args(train_file=tmp_path / "train.parquet", test_dir=tmp_path / "test", label_column_name=["kind"])
    more = {"select": "last", "seed": 0, "check_images": False, "skip_corrupt_images": False, "train_crop": "none"}
    found, names, _ = image_data.prepare_data(argparse.Namespace(**vars(args) | more), None, load(**vars(args)))
    assert names == ["a", "b"]
    assert found["test"].ids.tolist() == [0, 1]
