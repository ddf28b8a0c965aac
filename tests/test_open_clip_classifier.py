"""Models of OpenCLIP as classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from dual_encoders import clip_tokenizer
from open_clip.model import CLIP, CustomTextCLIP
from peft import get_peft_model
from safetensors.torch import save_file

import hf_visual_peft
from hf_visual_peft import ZeroShotClassifier, load_classifier, split_attention


NAMES = ["cat", "big_dog", "sea"]
TEXTS = ["a photo of a cat.", "a photo of a big dog.", "a photo of a sea."]
_TEXT = {"width": 16, "heads": 2, "layers": 2, "context_length": 24}
KINDS = {
    "clip": {"text_cfg": _TEXT},
    "siglip": {"text_cfg": {**_TEXT, "pool_type": "last", "no_causal_mask": True}, "init_logit_bias": -3.0},
}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    found = {}
    for kind, fields in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        vision = {"width": 64, "layers": 2, "patch_size": 8, "image_size": 16}
        architecture = {"embed_dim": 12, "vision_cfg": vision, **fields}
        model = (CLIP if kind == "clip" else CustomTextCLIP)(**architecture)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        config = {"model_cfg": {**architecture, "custom_text": kind != "clip"}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        clip_tokenizer().save_pretrained(folder)
        found[kind] = str(folder)
    return found


@torch.no_grad()
def reference(folder, texts=TEXTS):
    """The logits of OpenCLIP itself; its tokenizer gives the same ids as that of transformers."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    rows = [clip_tokenizer()(text)["input_ids"] for text in texts]
    assert rows[0] == [i for i in open_clip.SimpleTokenizer(context_length=24)(texts)[0].tolist() if i]
    ids = torch.tensor([row + [49407] * (24 - len(row)) for row in rows])
    image = model.encode_image(PIXELS, normalize=True)
    logits = model.logit_scale.exp() * image @ model.encode_text(ids, normalize=True).T
    return logits if model.logit_bias is None else logits + model.logit_bias


@pytest.mark.parametrize("kind", KINDS)
def test_classifies_saves_and_adapts(checkpoints, tmp_path, kind):
    base = ZeroShotClassifier.from_pretrained(checkpoints[kind], class_names=NAMES)
    expected = reference(checkpoints[kind])
    assert expected.std() > 0.1
    torch.testing.assert_close(base(PIXELS).logits, expected, atol=1e-4, rtol=1e-5)
    base.save_pretrained(tmp_path / "whole")
    again = ZeroShotClassifier.from_pretrained(str(tmp_path / "whole"))
    torch.testing.assert_close(again(PIXELS).logits, expected, atol=1e-4, rtol=1e-5)

    model = get_peft_model(base, hf_visual_peft.CoOpConfig(init_text="a photo of a"))
    torch.testing.assert_close(model(PIXELS).logits, expected, atol=1e-4, rtol=1e-5)
    torch.nn.init.normal_(base.adapters.active().vectors)
    model(PIXELS, labels=torch.tensor([0, 2])).loss.backward()
    assert base.adapters.active().vectors.grad.abs().max() > 0
    trained = model.eval()(PIXELS).logits
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(load_classifier(str(tmp_path / "adapter"))(PIXELS).logits, trained)


def test_methods_for_images(checkpoints):
    base = ZeroShotClassifier.from_pretrained(checkpoints["clip"], class_names=NAMES)
    expected = base(PIXELS).logits
    split_attention(base)
    model = get_peft_model(base, hf_visual_peft.VPTConfig(num_virtual_tokens=2))
    with model.disable_adapter():
        torch.testing.assert_close(model(PIXELS).logits, expected, atol=1e-4, rtol=1e-5)
    model(PIXELS, labels=torch.tensor([0, 2])).loss.backward()
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(grads) == 2
    assert all("visual" in name for name in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_for_both_towers(checkpoints, kind):
    base = ZeroShotClassifier.from_pretrained(checkpoints[kind], class_names=NAMES)
    with pytest.raises(hf_visual_peft.BackboneError, match=r"call hf_visual_peft.split_attention\(model\) first"):
        get_peft_model(base, hf_visual_peft.SSFConfig(tower="text"))
    expected = base(PIXELS).logits
    split_attention(base)
    model = get_peft_model(base, hf_visual_peft.SSFConfig(tower="both", init_weights=False)).eval()
    model(PIXELS, labels=torch.tensor([0, 2])).loss.backward()
    named = [n for n, p in model.named_parameters() if p.grad is not None]
    assert {name.split(".")[4] for name in named} == {"visual", "text"}
    adapted = model(PIXELS).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(PIXELS).logits, expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(PIXELS).logits, adapted, atol=1e-3, rtol=1e-4)


def test_what_is_missing_or_not_supported(checkpoints, tmp_path):
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": {}, "text_cfg": {"hf_model_name": "roberta-base"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    clip_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text tower of transformers"):
        ZeroShotClassifier.from_pretrained(str(tmp_path), class_names=NAMES)
    whole = json.loads(Path(checkpoints["clip"], "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="none of open_clip_model.safetensors"):
        ZeroShotClassifier.from_pretrained(str(tmp_path), class_names=NAMES)
