"""What README shows works: its first code block, run as it stands but for the name of the model."""

from __future__ import annotations

import re
from pathlib import Path

import transformers


README = Path(__file__).parents[1] / "README.md"


def test_first_code_block_runs(tmp_path, monkeypatch):
    (code, *_) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    assert code.count("google/vit-base-patch16-224-in21k") == 1
    exec(compile(code.replace("google/vit-base-patch16-224-in21k", "vit"), "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
