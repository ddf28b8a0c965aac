"""docs/methods.md is what the registry says."""

from __future__ import annotations

import ast
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from families import FAMILIES

import hf_visual_peft
from hf_visual_peft import find_backbone, sites
from hf_visual_peft.cli import catalogue
from hf_visual_peft.cli.catalogue import describe_sites
from hf_visual_peft.cli.main import main
from hf_visual_peft.core.targets import TargetedConfig, default_of, own_fields
from hf_visual_peft.sites import BranchSite, LinearSite, OutputSite, Placement, Shared, TokenSite, whole_module
from hf_visual_peft.sites.input import InputSite


PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


@pytest.fixture(scope="module")
def backbone():
    return find_backbone(FAMILIES["vit"].model())


def test_page_is_up_to_date(capsys):
    assert main(["methods", "--markdown"]) == 0
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out, "run `make docs`"


def test_every_method_has_its_equation_typeset():
    equations = yaml.safe_load((PAGE.parent / "site" / "equations.yaml").read_text(encoding="utf-8"))
    assert set(equations) == set(hf_visual_peft.list_methods())
    assert all(isinstance(line, str) and line for lines in equations.values() for line in lines)


def test_page_has_every_method_by_category():
    text = PAGE.read_text(encoding="utf-8")
    methods = hf_visual_peft.list_methods().values()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE))
    assert set(sections) == {method.config_cls.__name__ for method in methods}
    rows = re.findall(r"^\| \[(\w+)\]\(#(\w+)\) +\| (\w+)", text, flags=re.MULTILINE)
    assert [category for *_, category in rows] == sorted(method.category for method in methods)
    assert [name for name, *_ in rows] == list(sections)
    assert all(anchor == name.lower() for name, anchor, _ in rows)
    for method in methods:
        section = sections[method.config_cls.__name__]
        assert f"({method.paper.url})" in section
        assert f"`{method.equation}`" in section
        assert f"Category: {method.category}; visual tuning: {method.visual_tuning}\n" in section
        assert all(f"{count:,} (" in section for _, count in method.counts)
        assert f"Merges: {'yes' if method.mergeable else 'no'}. " in section
        common = {field.name for field in dataclasses.fields(TargetedConfig)}
        own = [field for field in dataclasses.fields(method.config_cls) if field.name not in common]
        assert all(f"`{field.name}` ({default_of(field)!r})" in section for field in own)
        assert ("calibrate(" in section) == method.calibrated
        assert ("- Videos: " in section) == method.video
    assert "arXiv None" not in text


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("adaptformer", {"r": 8}, "beside the MLP, on the stream before its norm"),
        ("convpass", {"sublayers": "attention"}, "beside attention, on the output of its norm, with the tokens' "
         "places, dropped with stochastic depth"),
        ("partial", {"k": 1}, "all of the last block and the final norm"),
        ("partial", {"k": 2}, "all of blocks 1 and 2 and the final norm"),
        ("linearprobe", {}, "all of the head"),
        ("ssf", {}, "output of the patch embedding, norm1, norm2, every linear of the blocks and the final norm"),
        ("sharedlora", {}, "input and output of query, key and value; `down` shared within each block"),
        ("fact", {}, "input and output of every linear of the blocks; `factors` shared by all blocks"),
        ("repadapter", {}, "output of norm1, merging into query, key and value; output of norm2, merging into fc1"),
        ("gps", {}, "weight and bias of the patch embedding and every linear of the blocks"),
        ("vpt", {}, "tokens after the prefix tokens"),
        ("vpt", {"deep": False}, "tokens after the prefix tokens, in block 0; tokens after the prefix tokens, from "
         "the block before, in blocks 1 and 2"),
    ],
)  # fmt: skip
def test_sites_in_words(name, fields, words, backbone):
    config = hf_visual_peft.get_method(name).config_cls(**fields)
    assert describe_sites(config.placements(backbone), backbone) == words


def test_sites_follow_the_placements(backbone):
    first, last = backbone.blocks[0], backbone.blocks[-1]
    shared = Shared("pool", lambda: None)
    placements = [
        Placement(first.path, "a", BranchSite("mlp", "sum"), None),
        Placement(last.roles["output"][0], "b", LinearSite(), None, shared),
        Placement(last.roles["fc2"][0], "b", LinearSite(), None, shared),
        Placement(last.roles["norm1"][0], "c", OutputSite(), None),
        Placement(last.path, "d", TokenSite(), None),
        whole_module(backbone.heads[0]),
    ]
    assert describe_sites(placements, backbone) == (
        "after the MLP, on the stream, in block 0; input and output of the output projection and fc2, in the last "
        "block; output of norm1, in the last block; tokens after the prefix tokens, in the last block; all of the "
        "head; `pool` shared within each block"
    )


@dataclass
class _Narrow(hf_visual_peft.VPTConfig):
    """A method that is another one with a field more, and another default."""

    deep: bool = False
    order: list[int] = field(default_factory=lambda: [2, 1])


def test_fields_of_a_method_that_derives_from_another(monkeypatch):
    assert [each.name for each in own_fields(_Narrow)] == [
        *("num_virtual_tokens", "deep", "dropout", "projection_dim", "init", "stages", "biases", "order"),
    ]
    method = dataclasses.replace(hf_visual_peft.get_method("vpt"), config_cls=_Narrow)
    monkeypatch.setattr(catalogue, "list_methods", lambda: {"narrow": method})
    listed = "`num_virtual_tokens` (10), `deep` (False), `dropout` (0.0), `projection_dim` (None), "
    listed += "`init` ('random'), `stages` (None), `biases` (False), `order` ([2, 1])"
    assert listed in catalogue.methods_markdown()


def test_what_stands_before_a_linear_acts_on_its_input(backbone):
    placements = [Placement(block.roles["fc1"][0], "a", InputSite(), None) for block in backbone.blocks]
    assert describe_sites(placements, backbone) == "input of fc1"


def _strings(tree):
    """The texts in code that are not docstrings, with the pieces of f-strings."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documents = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documents)
    return [node.value for node in constants if isinstance(node.value, str)]


def test_no_method_calls_its_config_by_a_fixed_name():
    """A config that derives from it is another class, and what goes wrong there names that."""
    names = {method.config_cls.__name__ for method in hf_visual_peft.list_methods().values()}
    for path in Path(hf_visual_peft.__file__).with_name("methods").rglob("*.py"):
        for text in _strings(ast.parse(path.read_text(encoding="utf-8"))):
            assert not names & set(re.findall(r"\w+", text)), f"{path.name}: {text!r}"


def test_errors_name_the_class_that_was_given(backbone):
    with pytest.raises(ValueError, match=r"^_Narrow.deep is False: prompts pass"):
        list(_Narrow().placements(dataclasses.replace(backbone, blocks=(backbone.blocks[0], backbone.blocks[2]))))


def test_contributing_names_sites_that_there_are():
    text = (PAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))
    assert {"TokenSite", "BranchSite", "OutputSite"} <= named <= set(sites.__all__)
    assert all(
        Path(PAGE.parents[1], path).exists() for path in re.findall(r"`((?:tests|hf_visual_peft)/[\w./]+)`", text)
    )
