"""The demonstration of class names, on tiny towers and packages of noise, beside plain transformers."""

from __future__ import annotations

import functools
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderModel,
)

from hf_visual_peft.cli.main import main
from hf_visual_peft.demo import dual_encoder, emoji, zero_shot


NAMES = [f"thing{number}" for number in range(12)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def _png(generator):
    page = io.BytesIO()
    pixels = generator.integers(0, 256, size=(8, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(page, "png")
    return page.getvalue()


def _pack(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """What `npm pack` writes: four sets of noise, one name that a set lacks, and one of another category."""
    folder = tmp_path_factory.mktemp("emoji")
    generator = np.random.default_rng(0)
    listed = [{"name": name.upper(), "unified": f"1F{n:03}", "category": "Objects"} for n, name in enumerate(NAMES)]
    listed.append({"name": "LOST", "unified": "2600-FE0F", "category": "Objects"})
    listed.append({"name": "FACE", "unified": "1F000", "category": "Smileys & Emotion"})
    for number, each in enumerate(emoji.SETS):
        pictures = {f"{each.folder}1f{n:03}{each.suffix}": _png(generator) for n in range(len(NAMES))}
        if number != 1:
            pictures[f"{each.folder}2600{each.suffix}"] = _png(generator)
        if number == 0:
            pictures[emoji.LIST] = json.dumps(listed).encode()
        _pack(folder / each.file, pictures)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, image_size=56)
    ).save_pretrained(folder / "image")
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "an", "emoji", "of", "a", ".", *NAMES])}
    vocabulary |= {f"{name}.": len(vocabulary) + n for n, name in enumerate(NAMES)}
    BertModel(BertConfig(vocab_size=len(vocabulary), **SIZES)).save_pretrained(folder / "text")
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder / "text")
    return folder


@pytest.fixture
def small(towers, monkeypatch):
    monkeypatch.setattr(zero_shot, "demo_checkpoint", lambda: towers / "image")
    monkeypatch.setattr(zero_shot, "find_text_tower", lambda: towers / "text")
    monkeypatch.setattr(zero_shot, "LEARNED", 6)
    monkeypatch.setattr(zero_shot, "CLASSES", 4)
    monkeypatch.setattr(zero_shot, "align", functools.partial(dual_encoder.align, steps=50))
    monkeypatch.setattr(emoji, "_svg_decoder", lambda size: emoji._decoded)  # the noise is a PNG by any name


def test_prints_one_table_whose_figures_are_right(small, packages, tmp_path, capsys):
    words = ["demo", "--task", "zero-shot", "--seed", "3", "--emoji_dir", str(packages)]
    assert main([*words, "--output_dir", str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert "Images: 12 emoji" in printed  # neither what a set lacks, nor another category
    assert [(row["method"], row["shots"]) for row in rows] == [
        ("zero-shot", 0),
        *((name, shots) for name in ("ProKeR", "LPPlusPlus", "TaskRes") for shots in (1, 2, 3)),
        ("zero-shot", 0),
        ("CoOp", 2),
        ("KgCoOp", 2),
    ]
    for row in rows[-3:]:
        assert row["harmonic_mean"] == pytest.approx(
            2 * row["base"] * row["new"] / max(row["base"] + row["new"], 1e-9)
        )

    checkpoint = tmp_path / "emoji-dual-encoder-3"
    model = VisionTextDualEncoderModel.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    unseen = np.random.default_rng(3).permutation(len(NAMES))[6:]
    texts = tokenizer([f"an emoji of a {NAMES[n]}." for n in unseen], padding=True, return_tensors="pt")
    pictures = emoji.load_emoji(packages, 56).pictures
    right = []
    with torch.no_grad():
        text = F.normalize(model.text_projection(model.text_model(**texts).pooler_output), dim=-1)
        for each in emoji.SETS:
            pixels = np.stack([np.asarray(pictures[each.name][n]) for n in unseen]) / 255
            pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            seen = model.vision_model(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)).pooler_output
            image = F.normalize(model.visual_projection(seen), dim=-1)
            right.append(((image @ text.T).argmax(-1) == torch.arange(len(unseen))).float().mean().item())
    assert rows[0]["accuracy"] == pytest.approx(np.mean(right))


def test_aligning_learns_the_pairs(towers):
    model, _ = dual_encoder.load_towers(towers / "image", towers / "text", 56)
    images, texts = torch.randn(3, 10, 32), torch.randn(10, 32)
    dual_encoder.align(model, images, texts, seed=0, steps=300)
    with torch.no_grad():
        logits = (
            F.normalize(model.visual_projection(images[1]), dim=-1)
            @ F.normalize(model.text_projection(texts), dim=-1).T
        )
    assert (logits.argmax(-1) == torch.arange(10)).float().mean() > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ssf"], "--method: not for --task zero-shot"),
        (["--epochs", "3", "--lr", "0.1"], "--epochs, --lr: not for --task zero-shot"),
    ],
)
def test_flags_of_the_other_task_are_refused(arguments, message, tmp_path, capsys):
    assert main(["demo", "--task", "zero-shot", "--output_dir", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_says_what_to_install(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    words = ["demo", "--task", "zero-shot", "--output_dir", str(tmp_path / "out"), "--emoji_dir", str(tmp_path)]
    assert main(words) == 1
    assert "npm pack emoji-datasource-google@16.0.0" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"demo-zero-shot"):
        dual_encoder.find_text_tower()
