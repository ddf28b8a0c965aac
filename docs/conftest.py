"""Runs the code blocks of the guides, in their order, in a folder with a tiny checkpoint and a few pictures."""

import shlex

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from hf_visual_peft.cli.main import main


def run_commands(example):
    """Run commands of this package in this process; those of others cannot be run without a network."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        if program == "hf-visual-peft":
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            assert main(words) == 0, line
        else:
            assert program == "pip", line


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """What the guides take for granted: a checkpoint, by the name that it has on the Hub, and folders of pictures."""
    folder = tmp_path_factory.mktemp("guide")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "facebook" / "dinov2-small")
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder / "facebook" / "dinov2-small")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for channel, name in enumerate(("red", "green")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 100, size=(32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield folder


pytest_collect_file = Sybil(
    parsers=[SkipParser(), PythonCodeBlockParser(), CodeBlockParser("bash", run_commands)],
    patterns=["index.md", "guides/*.md"],
    fixtures=["workplace"],
).pytest()
