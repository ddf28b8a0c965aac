"""Runs the code blocks of the guides, in their order, in a folder with a tiny checkpoint and a few pictures."""

import re
import shlex
import string
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from hf_visual_peft.cli.main import main
from hf_visual_peft.core import registry


REGISTERED = (
    registry._METHODS,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
)
DOCS = Path(__file__).parents[1] / "docs"


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


def save_dual_encoder(folder):
    """A tiny SigLIP whose tokenizer knows single letters."""
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**layers, "image_size": 28, "patch_size": 14}
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *string.ascii_lowercase, "."])}
    letters = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    letters.pre_tokenizer = Sequence([WhitespaceSplit(), Split("", "isolated")])
    letters.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=letters, **tokens).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)


@pytest.fixture(autouse=True)
def _methods_as_before():
    """A guide registers a method; other tests walk over all that there are."""
    kept = [(known, dict(known)) for known in REGISTERED]
    yield
    for known, before in kept:
        known.clear()
        known.update(before)


@pytest.fixture
def workplace(tmp_path_factory):
    """What the guides take for granted: a checkpoint, by the name that it has on the Hub, and folders of pictures."""
    folder = tmp_path_factory.mktemp("guide")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "facebook" / "dinov2-small")
    size = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder / "facebook" / "dinov2-small")
    save_dual_encoder(folder / "google" / "siglip-base-patch16-224")
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


PARSERS = [SkipParser(), PythonCodeBlockParser(), CodeBlockParser("bash", run_commands)]


def test_readme_adapts_a_dual_encoder_and_loads_it_again(workplace, capsys):
    page = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    section = page.split("## Adapt CLIP or SigLIP to class names\n")[1].split("\n## ")[0]
    command, code = re.findall(r"```(?:bash|python)\n(.*?)```", section, flags=re.DOTALL)
    run_commands(SimpleNamespace(parsed=command))
    assert "| kgcoop " in capsys.readouterr().out
    assert len([line for line in code.splitlines() if line]) == 3
    exec(compile(code, "README.md", "exec"), {})
    assert "['green', 'red']" in capsys.readouterr().out


PAGES = [DOCS / "index.md", DOCS / "command-line.md", *sorted(DOCS.glob("guides/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, workplace):
    """Block by block, in one test: a block uses what those before it made."""
    document = Sybil(PARSERS, path=str(DOCS)).parse(page)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
