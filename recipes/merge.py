"""Merge a saved adapter into its backbone, and export the result.

    hf-visual-peft merge out/lora merged
    hf-visual-peft merge out/lora merged --format transformers onnx torch_export

MODEL is the folder of a run, or an adapter or model on the Hub; OUTPUT a new folder. `transformers` writes a model
that `AutoModelForImageClassification.from_pretrained` loads without this library or peft, `onnx` the file `model.onnx`
and `torch_export` the file `model.pt2`, for any number of images. Each is loaded again, and nothing is written unless
it gives the same outputs. A method that does not merge can be exported to the latter two, with the adapter inside.
Other flags are those of `hf-visual-peft train`, such as --base_model_name_or_path.

Exit status: 0 done, 1 error, 2 wrong flags.
"""

from __future__ import annotations

import hf_visual_peft


# isort: split
import argparse
import functools
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from arguments import parse_args
from image_data import save_processor
from peft import PeftModel
from PIL import Image
from prediction import Saved, load_saved
from screen import Screen
from stopping import run_readably
from torch import Tensor, nn

from hf_visual_peft.peft_methods.methods import PEFT_METHODS


NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
Program = Callable[[], torch.export.ExportedProgram]
TOLERANCE = 1e-4  # relative to the largest output


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command; it also takes those of the recipe."""
    parser = argparse.ArgumentParser(
        prog="hf-visual-peft merge",
        usage="hf-visual-peft merge MODEL OUTPUT [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of an adapter or model with a trained head")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder, which must not exist")
    parser.add_argument("--format", nargs="+", choices=list(FORMATS), default=["transformers"])
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and the words for those of the recipe."""
    parser = build_parser()
    given, others = parser.parse_known_args(argv)
    if given.output.exists():
        parser.error(f"{given.output} exists: choose another folder")
    return given, others


def method_of(model: Any) -> str:
    """The type of the adapter of a model."""
    kind = model.peft_config["default"].peft_type
    return str(getattr(kind, "value", kind))


def merges(model: Any) -> bool:
    """Whether the adapter of a model folds into the weights of its backbone."""
    name = str(
        getattr(model.peft_config["default"].peft_type, "value", model.peft_config["default"].peft_type)
    ).lower()
    known = hf_visual_peft.list_methods().get(name) or PEFT_METHODS.get(name)
    return known is None or known.mergeable


class Logits(nn.Module):
    """A model as a function of pixels alone.

    Args:
        model: classifier.
        inputs: its extra arguments.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of images."""
        return self.model(pixel_values=pixel_values, **self.inputs).logits


def check(form: str, found: Any, expected: Tensor) -> None:
    """Raise an error unless outputs are those of the adapted model."""
    off = float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not off <= TOLERANCE:
        raise ValueError(
            f"--format {form}: what was written gives other outputs than the adapted model (off by {off:.1e} of the "
            "largest). Nothing is kept; share the adapter instead."
        )


def write_transformers(saved: Saved, folder: Path, program: Program, pixels: Tensor, expected: Tensor) -> None:
    saved.model.save_pretrained(folder)
    save_processor(saved.processor, saved.model, folder)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # weights that the class does not have give other outputs
    try:
        again = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    finally:
        transformers.logging.set_verbosity(verbosity)
    check("transformers", Logits(again.eval(), saved.inputs)(pixels), expected)


def exported(saved: Saved, pixels: Tensor) -> torch.export.ExportedProgram:
    """The model for any number of images."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(Logits(saved.model, saved.inputs), (pixels,), dynamic_shapes=({0: batch},))


def write_torch_export(saved: Saved, folder: Path, program: Program, pixels: Tensor, expected: Tensor) -> None:
    torch.export.save(program(), folder / "model.pt2")
    again = torch.export.load(folder / "model.pt2").module()
    check("torch_export", again(pixels), expected)
    check("torch_export", again(pixels[:1]), expected[:1])


def write_onnx(saved: Saved, folder: Path, program: Program, pixels: Tensor, expected: Tensor) -> None:
    import onnxruntime

    path = folder / "model.onnx"
    names = ["pixel_values"], ["logits"]
    torch.onnx.export(
        program(), f=path, verbose=False, external_data=False, input_names=names[0], output_names=names[1]
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (len(pixels), 1):
        check("onnx", session.run(None, {"pixel_values": pixels[:count].numpy()})[0], expected[:count])


FORMATS: dict[str, Callable[[Saved, Path, Program, Tensor, Tensor], None]] = {
    "transformers": write_transformers,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> Path:
    """Merge, write and check; return the folder."""
    given, others = parse(argv)
    for form in given.format:
        missing = [name for name in NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"--format {form} needs packages that are not installed: pip install {' '.join(missing)}")
    words = ["--model_name_or_path", given.model, "--do_predict", "-", *others]
    args, _ = parse_args([*words, "--output_dir", str(given.output)], __doc__)
    accelerator = Accelerator(cpu=True)
    Screen(accelerator, "none")
    saved = load_saved(args)
    saved.model.eval()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(3)]
    pixels = saved.processor(images=images, return_tensors="pt")["pixel_values"]
    expected = Logits(saved.model, saved.inputs)(pixels)
    merged = "There was no adapter"
    if isinstance(saved.model, PeftModel):
        if merges(saved.model):
            with warnings.catch_warnings():
                # what a class cannot hold is found below, by loading what was written
                warnings.filterwarnings("ignore", message=".*gets a bias by merging")
                saved.model = saved.model.merge_and_unload().eval()
            check("transformers", Logits(saved.model, saved.inputs)(pixels), expected)
            merged = "The adapter is merged"
        elif "transformers" in given.format:
            raise ValueError(
                f"{given.model}: {method_of(saved.model)} does not merge into the backbone, so there is no plain "
                "model of transformers. Export it with --format onnx or torch_export, or share the adapter."
            )
        else:
            merged = "The adapter does not merge and is inside"
    program = functools.cache(lambda: exported(saved, pixels))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.output.parent, prefix=".", suffix=".tmp") as aside:
        whole = Path(aside, "whole")
        whole.mkdir()
        for form in given.format:
            FORMATS[form](saved, whole, program, pixels, expected)
        os.replace(whole, given.output)
    print(f"{merged}; {', '.join(sorted(path.name for path in given.output.iterdir()))} are in {given.output}.")
    return given.output


if __name__ == "__main__":
    run_readably(main, show_traceback=parse()[0].traceback)
