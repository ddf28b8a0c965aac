"""Protocols: files in the community's layout, runs of them, and what the runs say together."""

import json
import math
import shutil
from pathlib import Path

import benchmark
import datasets
import numpy as np
import protocol
import protocol_data
import protocol_results
import pytest
import yaml
from arguments import parse_args
from recipe_runs import fails, paint


NAMES = ["amber", "beige"]
KEYS = {
    "name": "stand-in",
    "lists": {
        "train": "train800val200.txt", "test": "test.txt",
        "tune_train": "train800.txt", "tune_validation": "val200.txt",
    },
    "tasks": {"colours": {"classes": 3, "group": "natural"}, "tints": {"classes": 2, "group": "structured"}},
    "flags": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "select": "last", "train_crop": "none"},
    "seeds": [0, 1],
}  # fmt: skip
TUNED = {"ssf": {"learning_rate": [0.01, 1e-9]}}


def write_protocol(folder, **more):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(KEYS | more))
    return path


@pytest.fixture(scope="module")
def vtab(tmp_path_factory):
    """Two tasks as the archives of VTAB-1k hold them; in one, lists name paths with the folder `images`."""
    folder, rng = tmp_path_factory.mktemp("vtab"), np.random.default_rng(0)
    for task, about in KEYS["tasks"].items():
        lines = []
        for label in range(about["classes"]):
            for number in range(7):
                path = f"images/{label}/{number}.png"
                paint(folder / task / path, label, rng)
                lines.append(f"{path if task == 'tints' else path.removeprefix('images/')} {label}")
        lists = {"train800val200.txt": lines[::2] + lines[1::4], "test.txt": lines[3::4], "train800.txt": lines[::2]}
        for name, rows in (lists | {"val200.txt": lines[1::4]}).items():
            (folder / task / name).write_text("\n".join(rows) + "\n")
    return folder


def words(vit, vtab, own, output, *more, methods=("vpt",)):
    given = ["--protocol", str(own), "--data_dir", str(vtab), "--model_name_or_path", vit, "--progress", "none"]
    return [*given, "--methods", *methods, "--output_dir", str(output), *map(str, more)]


def test_runs_of_a_protocol(vit, vtab, tmp_path, capsys, monkeypatch):
    own = write_protocol(tmp_path, tune=TUNED)
    given = words(vit, vtab, own, tmp_path / "out", methods=("vpt", "ssf"))
    found = benchmark.main(given)
    files = sorted((tmp_path / "out" / "runs").glob("*.json"))
    runs = [json.loads(file.read_text()) for file in files]
    assert len(runs) == 2 * 2 * 2
    by = {(row["method"], row["task"], row["seed"]): row for row in runs}
    assert len({row["fingerprint"] for row in runs if row["task"] == "colours"}) == 1
    assert len({row["fingerprint"] for row in runs}) == 2
    tuned = [json.loads((tmp_path / "out" / "tuning" / "ssf" / "tints" / f"{n}.json").read_text()) for n in (0, 1)]
    best = max(tuned, key=lambda row: row["accuracy"])
    assert by["ssf", "tints", 0]["setting"] == best["setting"]
    assert not (tmp_path / "out" / "tuning" / "vpt").exists()
    row = found["methods"]["vpt"]
    mean = {task: np.mean([by["vpt", task, seed]["accuracy"] for seed in (0, 1)]) for task in KEYS["tasks"]}
    assert row["tasks"] == pytest.approx(mean)
    assert row["groups"] == pytest.approx({"natural": mean["colours"], "structured": mean["tints"]})
    config = json.loads((tmp_path / "out" / "models" / "vpt-tints-0" / "adapter_config.json").read_text())
    assert by["vpt", "tints", 0]["trained"] == 2 * config["num_virtual_tokens"] * 64  # of two blocks, not the head
    assert "mean of groups" in capsys.readouterr().out
    monkeypatch.setattr(benchmark.image_classification, "main", lambda words: pytest.fail("all runs are there"))
    assert benchmark.main(given) == found


@pytest.fixture(scope="module")
def sources(vtab, tmp_path_factory):
    """The task `tints` as class folders and as parquet, with a column of another kind beside the classes."""
    folder = tmp_path_factory.mktemp("sources")
    splits = {}
    for split, name in (("train", "train800val200.txt"), ("test", "test.txt")):
        rows = protocol_data.read_list(vtab / "tints", name)
        for path, label in rows:
            place = folder / "folders" / split / NAMES[label] / Path(path).name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(Path(path).read_bytes())
        features = datasets.Features(
            {"picture": datasets.Image(), "year": datasets.Value("int32"), "kind": datasets.ClassLabel(names=NAMES)}
        )
        columns = {
            "picture": [path for path, _ in rows],
            "year": [1900] * len(rows),
            "kind": [kind for _, kind in rows],
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
        (folder / "tables").mkdir(exist_ok=True)
        splits[split].to_parquet(folder / "tables" / f"{split}-00000-of-00001.parquet")
    return folder


SPLITS = {"train": "train", "test": "test", "tune_train": "train[:50%]", "tune_validation": "train[50%:]"}
SOURCED = {
    "folders": {"classes": 2, "folder": "folders"},
    "tables": {"classes": 2, "folder": "tables", "image": "picture", "label": "kind"},
}


def test_tasks_from_class_folders_and_parquet(vit, vtab, sources, tmp_path):
    """The same images give the same accuracy, whichever way they are stored, and each keeps its fingerprints."""
    (tmp_path / "data").mkdir()
    for name in ("folders", "tables"):
        (tmp_path / "data" / name).symlink_to(sources / name)
    (tmp_path / "data" / "tints").symlink_to(vtab / "tints")
    own = write_protocol(tmp_path, tasks=SOURCED | {"tints": {"classes": 2}}, splits=SPLITS, seeds=[0])
    benchmark.main(words(vit, tmp_path / "data", own, tmp_path / "out"))
    runs = {row["task"]: row for row in map(json.loads, (f.read_text() for f in (tmp_path / "out").glob("runs/*")))}
    assert set(runs) == {"folders", "tables", "tints"}
    assert len({row["fingerprint"] for row in runs.values()}) == 2  # lists have other names of classes
    assert runs["folders"]["data"] == runs["tables"]["data"]
    assert set(runs["folders"]["data"]) == {"train", "test"}
    assert len({row["accuracy"] for row in runs.values()}) == 1
    table = datasets.Dataset.from_parquet(str(tmp_path / "out" / "data" / "tables" / "test.parquet"))
    assert table.column_names == ["image", "label"]
    assert set(table["label"]) == set(NAMES)


def test_shots_and_tuning_from_parquet(vit, sources, tmp_path):
    own = write_protocol(
        tmp_path, tasks={"tables": SOURCED["tables"]}, lists={}, splits=SPLITS, seeds=[3], shots=[2], tune=TUNED
    )
    found = benchmark.main(words(vit, sources, own, tmp_path / "out", methods=("ssf",)))
    assert set(found["methods"]["ssf"]["tasks"]) == {"tables, 2 shots"}
    models = tmp_path / "out" / "models" / "ssf-tables-2-3"
    drawn = datasets.Dataset.from_parquet(str(models / "splits" / "train.parquet"))
    assert sorted(drawn["label"]) == sorted(2 * NAMES)
    assert len(list((tmp_path / "out" / "tuning" / "ssf" / "tables").glob("[01].json"))) == 2


def test_results_of_other_images_or_flags_are_not_continued(vit, vtab, tmp_path, monkeypatch):
    """Before anything trains, whatever is there is compared with what would run now."""
    own = write_protocol(tmp_path, tasks={"tints": {"classes": 2}}, seeds=[0], tune=TUNED)
    given = words(vit, vtab, own, tmp_path / "out", methods=("ssf",))
    benchmark.main(given)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.json")}
    own.write_text(own.read_text().replace("- 0\n", "- 0\n- 1\n"))  # one more seed

    monkeypatch.setattr(benchmark.image_classification, "main", lambda words: pytest.fail("it trains"))

    def refused(message, words=given):
        with pytest.raises(ValueError, match=message):
            benchmark.main(words)

    refused(r"runs/ssf-tints-0.json was run with weight_decay .*, now 0.5: choose another --output_dir",
            [*given, "--weight_decay", "0.5"])  # fmt: skip
    refused("was run with num_train_epochs 1, now 2", [*given, "--num_train_epochs", "2"])
    refused("was run with fields", [*given, "--modules_to_save", "classifier"])
    copied = tmp_path / "data" / "tints"
    shutil.copytree(vtab / "tints", copied)
    other = [str(tmp_path / "data") if word == str(vtab) else word for word in given]
    first = protocol_data.read_list(copied, "test.txt")[0][0]
    paint(Path(first), 1, np.random.default_rng(9))
    refused("was measured on other images of test than are here", other)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.json")} == before
    (tmp_path / "out" / "runs" / "ssf-tints-0.json").unlink()
    own.write_text(own.read_text().replace("1.0e-09", "1.0e-08"))
    refused(r"tuning/ssf/tints/1.json was run with learning_rate 1e-09, now 1e-08")
    (tmp_path / "out" / "tuning" / "ssf" / "tints" / "0.json").write_text("{}")
    refused(r"0.json is broken \(KeyError\('setting'\)\)")


def test_few_shots(vit, vtab, tmp_path):
    own = write_protocol(tmp_path, shots=[1, 2], seeds=[3], tasks={"tints": {"classes": 2}})
    found = benchmark.main(words(vit, vtab, own, tmp_path / "out"))
    assert set(found["methods"]["vpt"]["tasks"]) == {"tints, 1 shots", "tints, 2 shots"}
    table = (tmp_path / "out" / "models" / "vpt-tints-2-3" / "splits" / "train.csv").read_text().splitlines()
    assert sorted(line.rpartition(",")[2] for line in table[1:]) == ["0000", "0000", "0001", "0001"]
    labels = [str(number % 3) for number in range(30)]
    assert protocol_data.drawn(labels, 4, 0) == protocol_data.drawn(labels, 4, 0) != protocol_data.drawn(labels, 4, 1)
    assert sorted(protocol_data.drawn(labels, 40, 0)) == list(range(30))


@pytest.mark.parametrize("name", sorted(file.stem for file in protocol.FOLDER.glob("*.yaml")))
def test_protocols_that_are_here(name, vit, tmp_path):
    found = protocol.read_protocol(name)
    counts = {"vtab": 19, "fgvc": 5, "few": 11}
    assert len(found.tasks) == counts[name.partition("-")[0]]
    for method in ("vpt", "convpass", "linear"):
        for setting in found.settings(method)[:2]:
            flags = benchmark.words_of(found, method, setting, ["--model_name_or_path", vit])
            args, _ = parse_args([*flags, "--train_file", "a.csv", "--output_dir", str(tmp_path / "out")])
            assert args.learning_rate == setting.get(
                "learning_rate", found.flags.get("learning_rate", args.learning_rate)
            )
    classes = {task: about["classes"] for task, about in found.tasks.items()}
    if name.startswith("vtab"):
        assert (
            sum(classes.values())
            == 100 + 102 + 47 + 102 + 37 + 10 + 397 + 2 + 10 + 45 + 5 + 8 + 6 + 6 + 4 + 32 + 18 + 9
        )
        groups = [about["group"] for about in found.tasks.values()]
        assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"task": {}}, "unknown keys task"),
        ({"tasks": {}, "name": ""}, "name, tasks missing"),
        ({"tasks": {"colours": {"classes": 1}}}, "tasks.colours: give classes"),
        (
            {"tasks": {"colours": {"classes": 3, "grop": "x"}}},
            "tasks.colours: unknown keys grop; the keys are classes",
        ),
        ({"tasks": {"colours": {"classes": True}}}, "tasks.colours: give classes"),
        (
            {"tasks": {"colours": {"classes": 3, "hub": "a/b", "folder": "c"}}},
            "tasks.colours: give hub or folder, not",
        ),
        ({"tasks": {"colours": {"classes": 3, "label": "kind"}}}, "tasks.colours: label needs hub or folder"),
        ({"tasks": {"colours": {"classes": 3, "hub": 5}}}, "tasks.colours: hub must be text"),
        ({"tasks": {"colours": {"classes": 3, "hub": "a/b"}}}, "splits: train, test missing, for tasks with hub"),
        ({"tasks": {"c": {"classes": 3, "hub": "a/b"}}, "splits": {"tst": "test"}}, "splits: unknown tst; they are"),
        ({"lists": {}}, "lists: train, test missing, for tasks without hub or folder"),
        ({"lists": {"train": ["a"], "test": "b"}}, "lists: train must be text"),
        (
            {"tasks": {"c": {"classes": 3, "hub": "a/b"}}, "splits": {"train": "a", "test": "b"}, "tune": TUNED},
            "tune needs splits.tune_train and splits.tune_validation",
        ),
        ({"lists": ["a"], "flags": "b"}, "lists, flags: give a mapping"),
        ({"lists": {"train": "a", "tset": "b"}}, "lists: unknown tset; they are train, test"),
        ({"lists": {"train": "a", "test": "b"}, "tune": {"vpt": {"r": [1]}}}, "nothing is tuned on the test split"),
        ({"tune": {"vpt": {"learning_rate": 0.1}}}, "tune.vpt: give a list of values"),
        ({"seeds": []}, "seeds: give a list"),
        ({"shots": [0]}, "shots: give a list of whole numbers of at least 1"),
        ({"flags": ["a"]}, "flags: give a mapping"),
    ],
)
def test_keys_that_are_wrong(more, told, vit, vtab, tmp_path, capsys):
    own = write_protocol(tmp_path, **more)
    assert told in fails(capsys, lambda: benchmark.main(words(vit, vtab, own, tmp_path / "out")))


SHIFTED = {"train": "shifted.txt", "test": "shifted.txt"}


def test_other_bad_input(vit, vtab, tmp_path, capsys):
    first, second = (vtab / "tints" / "test.txt").read_text().splitlines()[::2]
    (vtab / "tints" / "shifted.txt").write_text(f"{first}\n{second[:-1]}2\n")

    def error(*more, **keys):
        own = write_protocol(tmp_path, **keys)
        return fails(capsys, lambda: benchmark.main(words(vit, vtab, own, tmp_path / "out", *more)))

    tasks = KEYS["tasks"] | {"birds": {"classes": 4}, "cars": {"classes": 5}}
    told = error(tasks=tasks | {"tints": {"classes": 3}})
    for part in (
        "birds lacks train800val200.txt, test.txt",
        "cars lacks",
        "tints has 2 classes in train800val200.txt",
    ):
        assert part in told
    several = tasks | {"folders": {"classes": 3, "folder": "nowhere"}, "far": {"classes": 3, "hub": str(tmp_path)}}
    told = error(tasks=several, splits={"train": "train", "test": "test"})
    for part in ("birds lacks", "folders lacks its folder nowhere", f"far is the folder {tmp_path} here: name it by"):
        assert part in told
    assert "tints has images of 2 in shifted.txt and should" in error(tasks={"tints": {"classes": 2}}, lists=SHIFTED)
    assert "no image of 2 can be drawn" in error(tasks={"tints": {"classes": 3}}, shots=[2])
    assert "--tasks boats: the tasks of the protocol are colours, tints" in error("--tasks", "boats")
    assert "--test_file is set by the protocol" in error("--test_file", "x")
    assert "the protocols here are few-shot, fgvc, vtab-a" in error("--protocol", "vtab")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_wrong(vit, sources, tmp_path, capsys):
    def error(about, *more, splits=SPLITS, **keys):
        own = write_protocol(tmp_path, tasks={"t": about, "u": about}, lists={}, splits=splits, **keys)
        told = fails(capsys, lambda: benchmark.main(words(vit, sources, own, tmp_path / "out", *more)))
        assert "; u" in told  # of all tasks at once
        return told

    def table_of(name, test, train=NAMES):
        (sources / name).mkdir()
        picture = next((sources / "folders").rglob("*.png")).read_bytes()
        for split, kinds in (("train", train), ("test", test)):
            images = [{"bytes": picture, "path": None}] * len(kinds)
            data = datasets.Dataset.from_dict({"picture": images, "kind": kinds})
            data.cast_column("picture", datasets.Image()).to_parquet(sources / name / f"{split}.parquet")
        return SOURCED["tables"] | {"folder": name}

    table = SOURCED["tables"]
    assert "t has 2 classes in the split train and should have 3" in error(table | {"classes": 3})
    assert "t: The data set has no image column 'photo'" in error(table | {"image": "photo"})
    assert "t: The data set has no label column 'class'" in error(table | {"label": "class"})
    assert "splits.train training: the data set has the splits train, test" in error(
        table, splits=SPLITS | {"train": "training"}
    )
    assert "no image of beige can be drawn from the split train[:1]" in error(
        table, splits=SPLITS | {"train": "train[:1]"}, shots=[1]
    )
    assert "t has images of other, which are not classes of training" in error(table_of("other", ["other"]))
    assert "t: its images have several classes each (kind)" in error(table_of("several", [NAMES], [NAMES, NAMES[:1]]))
    assert "t: 1 images of test have no class" in error(table_of("bare", [None]))
    (sources / "broken").mkdir()
    (sources / "broken" / "train.parquet").write_bytes(b"no parquet")
    assert "t: " in error({"classes": 2, "folder": "broken"})
    own = write_protocol(tmp_path, tasks={"t": {"classes": 2, "folder": "tables"}}, lists={}, splits=SPLITS)
    without = [word for word in words(vit, sources, own, tmp_path / "out") if word not in ("--data_dir", str(sources))]
    assert "t is on this machine: give --data_dir" in fails(capsys, lambda: benchmark.main(without))


def test_lists_that_are_wrong(vtab, tmp_path):
    (tmp_path / "a.txt").write_text("missing.png 1\nother one.png 2\n")
    with pytest.raises(ValueError, match=r"names 2 images that are not there: missing.png, other one.png"):
        protocol_data.read_list(tmp_path, "a.txt")
    (tmp_path / "a.txt").write_text("image.png\n")
    with pytest.raises(ValueError, match="line 1: 'image.png' is not 'path class'"):
        protocol_data.read_list(tmp_path, "a.txt")


def write_run(folder, method, task, accuracy, seed=0, **more):
    row = {"method": method, "task": task, "seed": seed, "shots": None, "group": task[0], "protocol": "p"}
    row |= {"fingerprint": f"of {task}", "classes": 2, "accuracy": accuracy, "trained": 1_000_000} | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{method}-{task}-{seed}.json").write_text(json.dumps(row))


def test_what_runs_say_together(tmp_path):
    rng = np.random.default_rng(0)
    first = {f"{group}{number}": float(rng.uniform(0.5, 0.9)) for group in "ab" for number in range(4)}
    second = {task: value - 0.05 + 0.01 * rng.normal() for task, value in first.items()}
    for task in first:
        for seed in (0, 1):
            write_run(tmp_path, "vpt", task, first[task] + (0.02 if seed else -0.02), seed)
            write_run(tmp_path, "ssf", task, second[task], seed)
    write_run(tmp_path, "vpt", "a9", 0.1)
    found = protocol_results.summary(protocol_results.read_runs([tmp_path]))
    vpt = found["methods"]["vpt"]
    values = [*first.values(), 0.1]
    assert vpt["mean_of_tasks"] == pytest.approx(np.mean(values))
    of_groups = [np.mean([v for task, v in first.items() if task[0] == g] + [0.1] * (g == "a")) for g in "ab"]
    assert vpt["mean_of_groups"] == pytest.approx(np.mean(of_groups))
    assert vpt["ppt"] == pytest.approx(vpt["mean_of_tasks"] * math.exp(-math.log10(1.1)))
    (pair,) = found["pairs"]
    assert pair["tasks"] == 8
    gaps = np.array([first[task] - second[task] for task in first])
    t = gaps.mean() / (gaps.std(ddof=1) / math.sqrt(8))
    assert pair["methods"] == ["ssf", "vpt"]
    assert pair["difference"] == pytest.approx(-gaps.mean())
    assert abs(t) > 2.365  # the 5 % quantile for 7 degrees of freedom
    assert pair["t_test"] < 0.05
    assert pair["wilcoxon"] == pytest.approx(2 / 2**8)  # every difference has the same sign
    assert "paired t test" in protocol_results.table_of(found)


def test_results_that_do_not_belong_together(tmp_path):
    with pytest.raises(ValueError, match="There are no runs"):
        protocol_results.read_runs([tmp_path])
    write_run(tmp_path, "vpt", "cifar", 0.5)
    write_run(tmp_path, "ssf", "cifar", 0.6, fingerprint="of another CIFAR")
    with pytest.raises(ValueError, match="were measured on different images of cifar: they are not averaged"):
        protocol_results.read_runs([tmp_path])
    write_run(tmp_path, "ssf", "cifar", 0.6, protocol="q")
    with pytest.raises(ValueError, match="of different protocols"):
        protocol_results.read_runs([tmp_path])
    (Path(tmp_path) / "ssf-cifar-0.json").write_text("{")
    with pytest.raises(ValueError, match=r"ssf-cifar-0.json is broken"):
        protocol_results.read_runs([tmp_path])
