"""Counts over the families of timm and transformers: what is asked, kept, and written."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hf_visual_peft.cli.main import main
from hf_visual_peft.core.registry import get_method
from hf_visual_peft.coverage import family_models, family_report, family_runs
from hf_visual_peft.coverage.cell import Cell, accept, run_cell
from hf_visual_peft.coverage.family_models import FamilyModel, NotRunnableError
from hf_visual_peft.coverage.family_runs import BACKBONE, SIZE, Result, Results, Task, answers, run_families
from hf_visual_peft.peft_methods.methods import any_method


timm = pytest.importorskip("timm")

FAMILIES = {
    "vision_transformer": ["vit_tiny_patch16_224", "test_vit"],
    "convnext": ["test_convnext"],
    "resnet": ["test_resnet"],
}


def test_families_are_those_that_the_libraries_tell():
    found = family_models.timm_families()
    assert set(found) == set(timm.list_modules())
    assert sorted(name for names in found.values() for name in names) == sorted(timm.list_models())
    folders = family_models.transformers_families(["bert", "llava", "sam", "vit"])
    first = {name: classes[0].rpartition(".")[2] for name, classes in folders.items()}
    assert first["vit"] == "ViTForImageClassification"
    assert first["llava"] == "LlavaForConditionalGeneration"  # the whole model, no part of it
    assert set(folders) == {"llava", "sam", "vit"}  # with pictures


def test_three_families_in_a_process(tmp_path, monkeypatch):
    """The smallest of a family stands for it; what is in the file is not run again."""
    monkeypatch.setattr(family_runs, "timm_families", lambda: FAMILIES)
    path = tmp_path / "families.jsonl"
    run_families(Results(path), ["timm"], ["ssf", "vpt"], limit=200)
    found = Results(path).found
    cells = {(each.model, each.item): each.status for each in found.values() if each.item != SIZE}
    assert cells == {
        ("test_vit", BACKBONE): "works",
        ("test_vit", "ssf"): "works",
        ("test_vit", "vpt"): "works",
        ("test_convnext", BACKBONE): "works",
        ("test_convnext", "ssf"): "works",
        ("test_convnext", "vpt"): "not applicable",
        ("test_resnet", BACKBONE): "works",
        ("test_resnet", "ssf"): "works",
        ("test_resnet", "vpt"): "not applicable",
    }
    assert found["timm", "test_convnext", "vpt"].reason.startswith("VPTConfig")
    monkeypatch.setattr(family_runs, "_Worker", None)  # nobody is asked again
    run_families(Results(path), ["timm"], ["ssf", "vpt"])
    page = family_report.to_markdown(Results(path))
    assert "| ssf            |     3 |       0 |       0 |     0 |        3 |" in page
    assert "A backbone is found in 3 of 3 families of timm, and in 3 of the 3 models that were asked." in page


def test_what_takes_too_long_is_told_and_the_rest_goes_on(monkeypatch):
    results = Results()
    task = Task("timm", "vision_transformer", "test_vit", ("ssf", "vpt"))
    family_runs._work(results, [task], jobs=1, limit=0.01, title="Models")
    assert [each.item for each in results.found.values()] == ["ssf", "vpt"]
    assert {(each.status, each.reason) for each in results.found.values()} == {
        ("skipped", "not done in 0 s of processor time")
    }


@pytest.mark.parametrize("line", ["{", '{"library": "timm"}', '["timm"]'])
def test_a_file_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "families.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"families.jsonl, line 1.*delete this line"):
        Results(path)
    assert path.read_text() == f"{line}\n"


def test_a_model_too_large_to_run_is_adapted_without_weights(monkeypatch):
    monkeypatch.setattr(family_models, "LARGEST", 1000)
    family_runs._subject.cache_clear()
    made = list(answers(Task("timm", "vision_transformer", "test_vit", ("adaptformer", "lora"))))
    made += answers(Task("timm", "convnext", "test_convnext", ("vpt",)))
    family_runs._subject.cache_clear()
    assert [each.status for each in made] == ["skipped", "skipped", "not applicable"]
    assert made[0].reason == "accepted, not run: 0 M parameters"


def test_a_dry_run_adapts_and_runs_nothing(monkeypatch):
    monkeypatch.setattr(family_models, "runnable", None)
    (made,) = answers(Task("timm", "vision_transformer", "test_vit", ("bitfit",), dry=True))
    assert (made.status, made.reason) == ("skipped", "accepted, not run: no run was asked for")


class _Images(nn.Module):
    """Reads the mean of an image through a linear whose part in the output can be switched off."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.share = share

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = pixel_values.mean(dim=(2, 3))
        return self.head(x + self.share * self.inner(x))


def _linear_lora(model, **given):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False, **given)


@pytest.mark.parametrize(("share", "status"), [(1.0, "works"), (1e-6, "fails")])
def test_an_adapter_has_to_move_the_output_by_itself(share, status, monkeypatch):
    """In an adapter that trains with a head, the head would hide that nothing else does."""
    from hf_visual_peft.coverage import cell

    monkeypatch.setattr(cell, "small_config_for", lambda method, model, **given: _linear_lora(model, **given))
    tiny = FamilyModel("images", "timm", lambda: _Images(share), positional=True)
    found = run_cell(any_method("lora"), tiny, tiny.model(), alone=True)
    assert found.status == status, found
    if status == "fails":
        assert "step" in found.reason


def test_what_others_refuse_is_a_fault(monkeypatch):
    from hf_visual_peft.coverage import cell

    monkeypatch.setattr(cell, "small_config_for", lambda method, model, **given: _linear_lora(model, **given))
    tiny = FamilyModel("images", "timm", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), positional=True)
    found = run_cell(any_method("lora"), tiny, tiny.model(), alone=True)
    assert found.status == "fails"  # peft finds no module of that name
    assert "inner" in found.reason


def test_what_this_library_refuses_is_no_fault():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    assert accept(get_method("vpt"), model).status == "not applicable"
    found = accept(any_method("lora"), model)
    assert found.status == "not applicable"
    assert "\n" not in found.reason


def test_a_model_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(family_models, "_of_timm", lambda name, **fields: nn.Linear(2, 2))
    with pytest.raises(NotRunnableError, match="RuntimeError"):
        family_models.runnable("timm", "test_vit")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--families", "keras"], "'keras': valid are timm and transformers"),
        (["--families", "timm", "--architectures", "vit"], "Unknown family 'vit'"),
        (["--families", "timm", "--methods", "nothing"], "Unknown method 'nothing'"),
        (["--families", "timm", "--fast"], "--fast"),
        (["--names"], "--families"),
        (["--dry"], "--families"),
    ],
)
def test_flags_that_make_no_sense(flags, message, capsys):
    assert main(["coverage", *flags]) == 1
    assert message in capsys.readouterr().err


def test_faults_are_told(tmp_path, capsys):
    path = tmp_path / "families.jsonl"
    results = Results(path)
    cells = {SIZE: Cell("works"), BACKBONE: Cell("works"), "ssf": Cell("fails", "training: KeyError: 'x'")}
    for item, cell in cells.items():
        results.add(Result("timm", "convnext", "test_convnext", item, cell.status, cell.reason, 5))
    for name in family_models.timm_families()["convnext"]:
        results.add(Result("timm", "convnext", name, SIZE, "works", parameters=5 + (name != "test_convnext")))
    arguments = ["--families", "timm", "--architectures", "convnext", "--methods", "ssf", "--json", str(path)]
    page = tmp_path / "families.md"
    assert main(["coverage", *arguments, "--markdown", str(page)]) == 1
    assert "timm, convnext: ssf on test_convnext: training: KeyError: 'x'" in capsys.readouterr().err
    assert "| convnext | test_convnext | ✓        | ✗ 1 |" in page.read_text()
    assert "1. training: KeyError: 'x'" in page.read_text()
    assert json.loads(path.read_text().splitlines()[0])["item"] == SIZE


def test_a_family_is_counted_by_the_model_that_stands_for_it():
    """Also where no method was tried; the sentence and the table count the same families."""
    results = Results()
    asked = [
        ("vit", "a.ViTForImageClassification", "works", ""),
        ("odd", "a.OddForDetection", "skipped", "not built: its default config builds no model"),
        ("odd", "a.OddModel", "works", "several, of which backbone= chooses one: 'a', 'b'"),
        ("bad", "a.BadModel", "not applicable", "BadModel has no vision backbone"),
        ("new", "a.NewModel", "skipped", "not built: its default config builds no model"),
    ]
    for family, model, status, reason in asked:
        results.add(Result("transformers", family, model, BACKBONE, status, reason, 5))
    results.add(Result("transformers", "vit", "a.ViTForImageClassification", "ssf", "works"))
    text = family_report.counts(results)
    assert "| backbone found |     2 |       1 |       1 |     0 |        4 |" in text
    assert "A backbone is found in 2 of 4 families of transformers, and in 2 of the 5 models that were asked." in text
    page = family_report.to_markdown(results)
    row = next(line for line in page.splitlines() if line.startswith("| odd"))
    assert "OddModel" in row  # and not the class that could not be built
    assert "✓" in row
