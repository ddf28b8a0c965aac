"""Folders and zip files of images: which folder is a class, what is left out, and what is refused."""

import os
import shutil
import zipfile
from pathlib import Path

import image_folders
import numpy as np
import pytest
from fingerprints import fingerprint
from PIL import Image
from recipe_runs import load, paint


def put(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        paint(root / name, number % 3, np.random.default_rng(number))
    return root


def samples(data):
    """Class and file of each sample."""
    names = data.features["label"].names
    rows = data.cast_column("image", image_folders.datasets.Image(decode=False))
    return [(names[row["label"]], Path(row["image"]["path"]).name) for row in rows]


def test_the_first_level_is_the_class(tmp_path):
    put(tmp_path, "cat/2023/a.png", "cat/2024/b.png", "dog/2023/x/c.png", "dog/d.png")
    (data,) = load(train_dir=tmp_path).values()
    assert samples(data) == [("cat", "a.png"), ("cat", "b.png"), ("dog", "c.png"), ("dog", "d.png")] or samples(
        data
    ) == [("cat", "a.png"), ("cat", "b.png"), ("dog", "d.png"), ("dog", "c.png")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat/a.png", "test/cat/b.png"], r"folders of splits \(test, train\), which would become classes"),
        (["Train/cat/a.png"], r"folders of splits \(Train\)"),
        (
            ["cat/train/a.png", "cat/test/b.png", "dog/train/c.png"],
            r"splits within classes \(cat/test, cat/train, dog",
        ),
        (["images/val/cat/a.png", "labels/val/cat/b.png"], r"splits within classes \(images/val, labels/val\)"),
        (["cat/a.png", "dog/b.png", "stray.png"], r"images beside the class folders \(stray\.png\)"),
        (["cat/a.png", "x1.png", "x2.jpg"], r"images beside the class folders \(x1\.png, x2\.jpg\)"),
        (["cat/a.png", "dog/b.png", "more/cat/c.png"], r"same name as classes .* \(more/cat\)"),
        (["a.png", "b.png"], r"images \(a\.png, b\.png\) and no class folders"),
    ],
)
def test_layouts_that_can_be_read_in_two_ways_are_refused(tmp_path, names, message):
    put(tmp_path, *names)
    with pytest.raises(ValueError, match=rf"--train_dir {tmp_path}.* {message}"):
        load(train_dir=tmp_path)


def test_names_of_splits_can_be_classes(tmp_path):
    put(tmp_path, "train/a.png", "car/b.png", "bus/nested/c.png")
    assert samples(load(train_dir=tmp_path)["train"]) == [("bus", "c.png"), ("car", "b.png"), ("train", "a.png")]


def test_links_are_followed_and_loops_found(tmp_path, capsys):
    put(tmp_path, "data/cat/a.png", "elsewhere/b.png", "c.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "c.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "data" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "data" / "owl").symlink_to(tmp_path / "no-folder")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    found = load(train_dir=tmp_path / "linked")["train"]
    assert samples(found) == [("cat", "a.png"), ("cat", "c.png"), ("dog", "b.png")]
    assert "2 broken links" in capsys.readouterr().out
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="cat/up is a link to a folder that contains it"):
        load(train_dir=tmp_path / "data")


@pytest.mark.parametrize("name", ["my [photos] é", "a*b?", "{x,y}", "[!a]"])
def test_names_with_signs_of_patterns(tmp_path, name):
    put(tmp_path / name, "[1]/a*.png", "é/b?.png")
    assert samples(load(train_dir=tmp_path / name)["train"]) == [("[1]", "a*.png"), ("é", "b?.png")]
    assert samples(load(dataset_name=tmp_path / name)["train"]) == [("[1]", "a*.png"), ("é", "b?.png")]
    table = tmp_path / name / "[t]*.csv"
    table.write_text("image,label\n[1]/a*.png,x\né/b?.png,y\n")
    data = load(train_file=table)["train"]
    assert data["label"][:] == ["x", "y"]
    assert data[1]["image"].size == (24, 20)


@pytest.mark.parametrize("flag", ["train_dir", "test_dir", "dataset_name"])
@pytest.mark.parametrize(
    ("name", "message"), [("nowhere/photos", "there is no such folder"), ("empty", "has no image")]
)
def test_missing_and_empty_folders_are_named(tmp_path, flag, name, message):
    put(tmp_path / "photos", "cat/a.png", "dog/b.png")
    (tmp_path / "empty").mkdir()
    given = {"train_dir": tmp_path / "photos"} if flag == "test_dir" else {}
    with pytest.raises(ValueError, match=rf"--{flag} {tmp_path / name}.* ?{message}"):
        load(**given, **{flag: tmp_path / name})


def test_what_is_left_out_is_told(tmp_path, capsys):
    put(tmp_path, "cat/a.png", "dog/b.PNG", "dog/.hidden.png", "__MACOSX/dog/._b.png", ".ipynb_checkpoints/c.png")
    for name in ("cat/x.heic", "cat/y.HEIC", "cat/z.jxl", "dog/scan.dcm", "dog/noname", "cat/movie.mpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"any")
    (tmp_path / "owl").mkdir()
    (tmp_path / "yak").mkdir()
    (tmp_path / "yak" / "a.heic").write_bytes(b"any")
    assert samples(load(train_dir=tmp_path)["train"]) == [("cat", "a.png"), ("dog", "b.PNG")]
    told = capsys.readouterr().out
    assert "no image in owl, yak, so they are not classes" in told
    assert "1 .dcm, 3 .heic, 1 .jxl, 1 .mpg, 1 .txt, 1 without suffix" in told


def test_every_kind_of_file_that_pillow_reads_is_taken(tmp_path):
    rgb = Image.new("RGB", (8, 8), (200, 10, 10))
    names = ["a.avif", "b.webp", "c.TIFF", "d.jp2", "e.qoi", "f.jfif"]
    known = [name for name in names if Path(name).suffix.lower() in image_folders.image_suffixes()]
    assert {"b.webp", "c.TIFF", "f.jfif"} <= set(known)
    for name in known:
        (tmp_path / "red").mkdir(exist_ok=True)
        rgb.save(tmp_path / "red" / name)
    put(tmp_path, "blue/1.png")
    assert [name for label, name in samples(load(train_dir=tmp_path)["train"]) if label == "red"] == known


def test_one_class_is_enough_for_a_test(run, photos, tmp_path):
    shutil.copytree(photos / "test" / "green", tmp_path / "test" / "green")
    done = run(
        "--max_train_steps", 1, data=["--train_dir", str(photos / "train"), "--test_dir", str(tmp_path / "test")]
    )
    assert 0 <= done.results["test_accuracy"] <= 1
    with pytest.raises(ValueError, match="The train split has one class, green"):
        run(data=["--train_dir", str(tmp_path / "test")], output="one")


def test_local_data_sets_are_read_alike(tmp_path, capsys):
    put(tmp_path / "a", "training/cat/x/1.png", "training/dog/2.png", "val/cat/3.png", "extra/owl/4.png")
    found = load(dataset_name=tmp_path / "a")
    assert {split: samples(data) for split, data in found.items()} == {
        "train": [("cat", "1.png"), ("dog", "2.png")],
        "validation": [("cat", "3.png")],
    }
    assert "no split reads extra" in capsys.readouterr().out
    put(tmp_path / "b", "train/cat/1.png", "val/cat/2.png", "dev/cat/3.png")
    with pytest.raises(ValueError, match="several folders for validation: dev, val"):
        load(dataset_name=tmp_path / "b")
    put(tmp_path / "c", "data/train/cat/1.png", "data/train/dog/1.png")
    assert len(load(dataset_name=tmp_path / "c")["train"]) == 2


def test_local_data_sets_with_metadata(tmp_path):
    put(tmp_path / "a", "x.png", "y.png")
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\nx.png,NA\ny.png,007\n")
    assert load(dataset_name=tmp_path / "a")["train"]["label"][:] == ["NA", "007"]
    put(tmp_path / "b", "train/x.png", "test/y.png")
    for split, row in (("train", "x.png,None"), ("test", "y.png,1")):
        (tmp_path / "b" / split / "metadata.csv").write_text(f"file_name,label\n{row}\n")
    found = load(dataset_name=tmp_path / "b")
    assert {split: data["label"][:] for split, data in found.items()} == {"train": ["None"], "test": ["1"]}


@pytest.mark.parametrize("flag", ["train_dir", "train_file"])
@pytest.mark.parametrize("top", ["", "photos/"])
def test_zip_files_of_class_folders(tmp_path, flag, top):
    put(tmp_path / "p", "cat/1.png", "dög/[2].png", "dög/more/3.png")
    with zipfile.ZipFile(tmp_path / "p [1].zip", "w") as archive:
        for path in sorted((tmp_path / "p").rglob("*.png")):
            archive.write(path, top + path.relative_to(tmp_path / "p").as_posix())
        archive.writestr(f"{top}__MACOSX/cat/._1.png", b"")
        archive.writestr(f"{top}cat/notes.txt", b"")
    data = load(**{flag: tmp_path / "p [1].zip"})["train"]
    names = data.features["label"].names
    assert names == ["cat", "dög"]
    assert [names[label] for label in data["label"][:]] == ["cat", "dög", "dög"]
    assert np.array_equal(data[1]["image"], Image.open(tmp_path / "p" / "dög" / "[2].png"))
    raw = data.select_columns("image").cast_column("image", image_folders.datasets.Image(decode=False))
    folder = load(train_dir=tmp_path / "p")["train"]
    unpacked = folder.select_columns("image").cast_column("image", image_folders.datasets.Image(decode=False))
    ids = np.array([0, 1, 1])
    assert fingerprint(raw, ids, names) == fingerprint(unpacked, ids, names)
    key = data._fingerprint
    stat = (tmp_path / "p [1].zip").stat()
    os.utime(tmp_path / "p [1].zip", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert load(**{flag: tmp_path / "p [1].zip"})["train"]._fingerprint != key, "another file, other features"


def test_bad_zip_files(tmp_path):
    (tmp_path / "text.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"text\.zip is not a readable zip file"):
        load(train_file=tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "splits.zip", "w") as archive:
        for split in ("train", "test"):
            archive.writestr(f"photos/{split}/cat/1.png", b"")
    with pytest.raises(ValueError, match=r"splits\.zip holds folders of splits \(test, train\)"):
        load(train_dir=tmp_path / "splits.zip")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "splits.zip", tmp_path / "folder")
    with pytest.raises(ValueError, match=r"has no images, but files for --train_file: 1 \.zip"):
        load(train_dir=tmp_path / "folder")
    with pytest.raises(ValueError, match=r"nowhere\.zip: there is no such file"):
        load(train_file=tmp_path / "nowhere.zip")
