"""Real pictures with names that need no Hub: emoji of four freely licensed sets, in packages of npm."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from PIL.Image import Image

CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
LIST = "package/emoji.json"  # names and categories, in the first package


@dataclass(frozen=True)
class EmojiSet:
    """One drawing of every emoji.

    Attributes:
        name: of the set.
        package: of npm.
        version: of that.
        licence: of the pictures.
        folder: of the pictures in the package.
        suffix: of their files.
    """

    name: str
    package: str
    version: str
    licence: str
    folder: str
    suffix: str

    @property
    def file(self) -> str:
        """The file that `npm pack` writes."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SETS = (
    EmojiSet("noto", "emoji-datasource-google", "16.0.0", "Apache-2.0", "package/img/google/64/", ".png"),
    EmojiSet("twemoji", "emoji-datasource-twitter", "16.0.0", "CC-BY-4.0", "package/img/twitter/64/", ".png"),
    EmojiSet("fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "package/assets/", ".webp"),
    EmojiSet("openmoji", "openmoji", "17.0.0", "CC-BY-SA-4.0", "package/color/svg/", ".svg"),
)


@dataclass(frozen=True)
class Emoji:
    """Names, and the picture of each in every set.

    Attributes:
        names: of the emoji.
        pictures: by set, in the order of the names; RGB on white.
    """

    names: list[str]
    pictures: dict[str, list[Image]]


def find_packages(folder: Path) -> list[Path]:
    """The files of the packages, which `npm pack` writes into the folder if they are not there.

    Raises:
        ModuleNotFoundError: there is no npm, or resvg-py is not installed.
        OSError: a package cannot be had.
    """
    missing = [each for each in SETS if not (folder / each.file).is_file()]
    names = [f"{each.package}@{each.version}" for each in missing]
    if missing and shutil.which("npm") is None:
        raise ModuleNotFoundError(
            "The pictures are in packages of npm, which is not installed. Get them with `npm pack "
            f"{' '.join(names)}` on another machine, and put the files into {folder} (--emoji_dir)."
        )
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", *names], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"`npm pack {' '.join(names)}` failed in {folder}: {done.stderr.strip()[-300:]}")
    return [folder / each.file for each in SETS]


def load_emoji(folder: Path, size: int) -> Emoji:
    """The emoji of five categories that all sets have.

    Args:
        folder: of the packages.
        size: side of the pictures, pixels.

    Raises:
        ModuleNotFoundError: npm or resvg-py is missing.
        OSError: a package cannot be had.
    """
    decode = {".png": _decoded, ".webp": _decoded, ".svg": _svg_decoder(size)}
    files = find_packages(folder)
    with tarfile.open(files[0]) as archive:
        member = archive.extractfile(LIST)
        assert member is not None
        listed = [each for each in json.load(member) if each["category"] in CATEGORIES]
    raw: dict[str, dict[str, bytes]] = {}
    for each, file in zip(SETS, files, strict=True):
        with tarfile.open(file) as archive:
            raw[each.name] = {
                Path(member.name).stem.lower(): archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.name.startswith(each.folder) and member.name.endswith(each.suffix)
            }
    names: list[str] = []
    found: dict[str, list[bytes]] = {each.name: [] for each in SETS}
    for entry in listed:
        name = entry["name"].lower()
        codes = [entry["unified"].lower(), entry["unified"].lower().replace("-fe0f", "")]
        pictures = [next((raw[each.name][code] for code in codes if code in raw[each.name]), None) for each in SETS]
        if name not in names and None not in pictures:
            names.append(name)
            for each, picture in zip(SETS, pictures, strict=True):
                found[each.name].append(picture)  # type: ignore[arg-type]
    drawn = {
        each.name: [_on_white(decode[each.suffix](picture), size) for picture in found[each.name]] for each in SETS
    }
    return Emoji(names, drawn)


def _decoded(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content))


def _svg_decoder(size: int) -> Callable[[bytes], Any]:
    try:
        import resvg_py  # type: ignore[import-not-found]
    except ImportError:
        raise ModuleNotFoundError(
            "The drawings of openmoji are SVG files, which the package 'resvg-py' renders; it is not installed: "
            'pip install "hf-visual-peft[demo-zero-shot]".',
            name="resvg_py",
        ) from None
    return lambda content: _decoded(bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=size, height=size)))


def _on_white(picture: Any, size: int) -> Image:
    from PIL import Image

    transparent = picture.convert("RGBA").resize((size, size), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", transparent.size, "white")
    return Image.alpha_composite(white, transparent).convert("RGB")
