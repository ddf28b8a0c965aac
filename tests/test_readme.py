"""What README shows works: its first code block, run as it stands but for the name of the model."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

import hf_visual_peft


README = Path(__file__).parents[1] / "README.md"
# what trains whole modules of the backbone merges as a matter of course
WHOLE = {m.config_cls.__name__ for m in hf_visual_peft.list_methods().values() if m.whole_modules}


def test_first_code_block_runs(tmp_path, monkeypatch):
    (code, *_) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    assert code.count("google/vit-base-patch16-224-in21k") == 1
    exec(compile(code.replace("google/vit-base-patch16-224-in21k", "vit"), "README.md", "exec"), {})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


def test_names_every_method_with_its_count():
    text = README.read_text(encoding="utf-8")
    category = None
    rows = {}
    for line in text.splitlines():
        if heading := re.fullmatch(r"\*\*(\w+)\*\*", line):
            category = heading[1].lower()
        elif row := re.match(r"\| `(\w+Config)` \|", line):
            assert row[1] not in rows
            rows[row[1]] = (category, line)
    methods = {method.config_cls.__name__: method for method in hf_visual_peft.list_methods().values()}
    assert set(rows) == set(methods)
    for name, (category, line) in rows.items():
        method = methods[name]
        assert category == method.category
        assert f"{method.counts[0][1]:,}" in line or method.calibrated, (name, method.counts)
        assert (re.search("; merges( |$)", line.split("|")[2]) is not None) == (method.mergeable and name not in WHOLE)
        assert ("from data" in line) == method.calibrated
        assert ("for videos" in line) == method.video
        for number in re.findall(r"\d[\d,]{3,}", line.split("|")[3]):
            assert int(number.replace(",", "")) in {count for _, count in method.counts}, (name, number)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([\w/.-]+)\)", README.read_text(encoding="utf-8"))
    assert "docs/methods.md" in links
    assert all((README.parent / link).exists() for link in links)
