"""Requests that no server should answer with success."""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def picture(seed: int = 0, size: tuple[int, int] = (40, 30), form: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0" * 100)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def malformed(generator: random.Random, names: Sequence[str], large: int) -> dict[str, Any]:
    """A malformed request: some of `query`, `content` and `kind`, which is the content type.

    Args:
        generator: of random numbers.
        names: of adapters that there are, so many that a request may not name them all.
        large: bytes that are too many.
    """
    good = picture(generator.randrange(99), form=generator.choice(FORMATS))
    junk = generator.randbytes(generator.randrange(1, 300))
    name = names[0]
    paths = [f"../{name}", "/etc/passwd", f"..%2f..%2f{name}", f"{name}/", f"{name}%00", f"./{name}", name.upper(), ""]
    kind = generator.choice(["image/png", "application/octet-stream", "", "nonsense", "a/b/c"])
    top_k = generator.choice(["0", "-1", "many", "1e9", "10001", "", "NaN"])
    field = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nword\r\n--x--\r\n'
    return generator.choice(
        [
            {"query": f"adapter={generator.choice(paths)}"},
            {"query": f"adapter={'x' * generator.randrange(101, 3000)}"},
            {"query": f"adapter={name}&top_k={top_k}"},
            {"query": "&".join(f"adapter={one}" for one in [*names, *(f"no{number}" for number in range(20))])},
            {"query": ""},
            {"content": b""},
            {"content": junk, "kind": kind},
            {"content": good, "kind": generator.choice(["application/json", "text/html; charset=x", "text/plain"])},
            {"content": good[: generator.randrange(1, max(len(good) // 3, 2))]},
            {"content": bomb(generator.randrange(20_000, 2**31), generator.randrange(20_000, 2**31))},
            {"content": b"\x89PNG\r\n\x1a\n" + junk},
            {"content": b"\xff\xd8\xff\xe0" + junk},
            {"content": b"GIF89a" + junk},
            {"content": b"RIFF" + junk[:4] + b"WEBP" + junk},
            {"content": b"%!PS-Adobe-3.0 EPSF-3.0\n" + junk},
            {"content": junk, "kind": "multipart/form-data"},
            {"content": junk, "kind": "multipart/form-data; boundary=x"},
            {"content": field, "kind": "multipart/form-data; boundary=x"},
            {"content": bytes(large)},
        ]
    )
