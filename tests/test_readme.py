"""What README shows works: its first code block, run as it stands but for the name of the model."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

import hf_visual_peft


README = Path(__file__).parents[1] / "README.md"


def test_first_code_block_runs(tmp_path, monkeypatch):
    (code, *_) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    assert code.count("google/vit-base-patch16-224-in21k") == 1
    exec(compile(code.replace("google/vit-base-patch16-224-in21k", "vit"), "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_counts_the_methods():
    methods = len(hf_visual_peft.list_methods()) + len(hf_visual_peft.list_language_methods())
    assert f" {methods} methods " in README.read_text(encoding="utf-8")


def test_fits_a_screen_or_two():
    assert len(README.read_text(encoding="utf-8").splitlines()) < 120


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([\w/.-]+)\)", README.read_text(encoding="utf-8"))
    assert "docs/methods.md" in links
    assert all((README.parent / link).exists() for link in links)
