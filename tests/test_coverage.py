"""The coverage matrix: what it calls a failure, and that it reports, writes and compares what it finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_visual_peft import find_backbone, get_method, list_methods
from hf_visual_peft.cli.main import main
from hf_visual_peft.coverage import cell as cells
from hf_visual_peft.coverage import report
from hf_visual_peft.coverage.cell import Cell, run_cell
from hf_visual_peft.coverage.matrix import FAST_ARCHITECTURES, FAST_METHODS, choose_cells, run_matrix, run_row
from hf_visual_peft.coverage.models import MODELS
from hf_visual_peft.coverage.tiny import by_name


COMMITTED = Path(__file__).parents[1] / "docs" / "coverage.json"
VIT = MODELS["vit"]


def run(name, tiny=VIT, **changes):
    return run_cell(dataclasses.replace(get_method(name), **changes), tiny, tiny.model())


def vit_with(hook):
    """The tiny ViT with a forward hook on its last norm, whose output the classifier reads."""

    def build():
        model = VIT.build()
        model.vit.layernorm.register_buffer("seen", torch.zeros(()))
        model.vit.layernorm.register_forward_hook(hook)
        return model

    return dataclasses.replace(VIT, build=build)


def test_every_image_classifier_of_transformers_is_listed():
    assert set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models(name):
    """The same model every time, small, alive, taking its other size; images enter it where the backbone says."""
    tiny = MODELS[name]
    if tiny.missing_package:
        pytest.skip(f"{tiny.missing_package} is not installed")
    model, again = tiny.model(), tiny.model()
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert sum(p.numel() for p in model.parameters()) < 150_000
    for size in filter(None, (tiny.size, tiny.other_size)):
        outputs = cells.tensors_of(tiny.call(model, tiny.arguments(2, size)))
        assert outputs
        assert all(output.isfinite().all() for output in outputs)
        assert any(output.ndim and not torch.equal(output[0], output[-1]) for output in outputs)
    backbone = find_backbone(model)
    if name in ("siglip2", "imagegpt"):  # they get patches, and colors by number
        assert (backbone.image_channels, backbone.reads_images) == (0, "")
    else:
        channels = tiny.arguments(1)["pixel_values"].shape[2 if tiny.video else 1]
        assert backbone.image_channels == model.get_submodule(backbone.reads_images).in_channels == channels


def test_two_architectures_of_one_name_are_refused():
    with pytest.raises(ValueError, match="vit"):
        by_name(VIT, MODELS["deit"], VIT)


@pytest.mark.parametrize("name", ["bitfit", "gps", "ssf", "stadapter", "vpt"])
def test_a_cell_that_works(name):
    assert run(name) == Cell("works")


def test_what_the_library_refuses_is_not_applicable(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("A 2.5 wide VPT needs tokens,\nand ResNet has none. Try SSF.")

    monkeypatch.setattr(cells, "get_peft_model", refuse)
    assert run("vpt") == Cell("not applicable", "A 2.5 wide VPT needs tokens, and ResNet has none")


def test_a_method_that_breaks_fails(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("blocks")

    monkeypatch.setattr(cells, "get_peft_model", broken)
    assert run("vpt") == Cell("fails", "adapting: KeyError: 'blocks'")


def test_a_method_that_says_it_merges_and_does_not_fails():
    found = run("vpt", mergeable=True)
    assert found.status == "fails"
    assert found.reason.startswith("merging: ValueError: ")


def test_a_wrong_merge_fails(monkeypatch):
    tuner = get_method("ssf").tuner_cls
    monkeypatch.setattr(tuner, "merge_and_unload", lambda model, *args, **kwargs: model.unload())
    found = run("ssf")
    assert found.status == "fails"
    assert found.reason.startswith("merging: differs from the output before by ")


def test_an_adapter_that_is_not_saved_fails(monkeypatch):
    load = cells.PeftModel.from_pretrained

    def load_and_lose(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if ".ssf_" in name).zero_()
        return model

    monkeypatch.setattr(cells.PeftModel, "from_pretrained", load_and_lose)
    found = run("ssf")
    assert found.status == "fails"
    assert found.reason.startswith("save and load: differs from the saved model's output by ")


def test_a_moving_statistic_fails():
    def count(norm, args, output):
        if norm.training:
            norm.seen += 1
        return output + norm.seen

    found = run("ssf", vit_with(count))
    assert found.status == "fails"
    assert found.reason.startswith("disable_adapter: differs from the base model's output by ")


def test_a_moving_frozen_weight_fails():
    def drift(norm, args, output):
        if norm.training:
            norm.weight.data = norm.weight.data + 1

    assert run("adaptformer", vit_with(drift)).reason == (
        "training: a step moves frozen parameters, base_model.model.vit.layernorm.weight"
    )


def test_an_adapter_without_effect_fails():
    """The head still trains, and changes the loss."""
    for cut in (torch.Tensor.detach, lambda output: 0 * output + 1):
        found = run("adaptformer", vit_with(lambda norm, args, output, cut=cut: cut(output)))
        assert found == Cell("fails", "training: a step moves no parameter of the adapter")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError, Cell("works", "no other image size: only 17 tokens")),
        (RuntimeError, Cell("fails", "another image size: RuntimeError: only 17 tokens")),
    ],
)
def test_another_image_size(error, expected):
    calls = []

    def after_the_base(norm, args, output):
        """The base model takes the other size first; the adapted one is the next."""
        if output.shape[1] != 17:
            calls.append(1)
            if len(calls) == 2:
                raise error("only 17 tokens. No more.")

    assert run("adaptformer", vit_with(after_the_base)) == expected


def test_a_missing_package_skips_the_row(monkeypatch):
    tiny = dataclasses.replace(VIT, package="no_such_package")
    monkeypatch.setattr("hf_visual_peft.coverage.matrix.MODELS", {"vit": tiny})
    assert run_row("vit", ["ssf"]) == {"ssf": Cell("skipped", "no_such_package is not installed")}


def test_an_architecture_that_cannot_be_built_fails_alone(monkeypatch):
    def build():
        raise AttributeError("no ViTConfig. Sorry.")

    models = {"vit": dataclasses.replace(VIT, build=build), "deit": MODELS["deit"]}
    monkeypatch.setattr("hf_visual_peft.coverage.matrix.MODELS", models)
    assert run_matrix({"vit": ["ssf"], "deit": ["ssf"]}, jobs=1, progress=False) == {
        "vit": {"ssf": Cell("fails", "building: AttributeError: no ViTConfig")},
        "deit": {"ssf": Cell("works")},
    }


def test_choosing_cells():
    everything = choose_cells()
    assert list(everything) == list(MODELS)
    assert all(names == list(list_methods()) for names in everything.values())
    fast = choose_cells(fast=True)
    assert list(fast) == list(MODELS)
    assert {row for row, names in fast.items() if len(names) == len(list_methods())} == set(FAST_ARCHITECTURES)
    assert all(set(FAST_METHODS) <= set(names) for names in fast.values())
    assert choose_cells(["SSF", "bitfit"], ["swin", "vit"]) == {"vit": ["bitfit", "ssf"], "swin": ["bitfit", "ssf"]}
    with pytest.raises(ValueError, match="no_such_method"):
        choose_cells(["no_such_method"])
    with pytest.raises(ValueError, match="no_such_model"):
        choose_cells(architectures=["vit", "no_such_model"])
    with pytest.raises(ValueError, match="fast subset"):
        choose_cells(["gps"], ["deit"], fast=True)


MATRIX = {
    "vit": {"ssf": Cell("works"), "vpt": Cell("works", "no other image size: 17 tokens")},
    "resnet": {"ssf": Cell("fails", "merging: KeyError: 'x: y'"), "vpt": Cell("not applicable", "no tokens")},
    "dinat": {"ssf": Cell("skipped", "natten is not installed"), "vpt": Cell("skipped", "natten is not installed")},
}


def test_json_round_trip(tmp_path):
    text = report.to_json(MATRIX)
    assert text == report.to_json({row: dict(reversed(MATRIX[row].items())) for row in reversed(MATRIX)})
    assert sum('"ssf"' in line for line in text.splitlines()) == 3
    path = tmp_path / "matrix.json"
    path.write_text(text, encoding="utf-8")
    assert report.read_json(path) == MATRIX


@pytest.mark.parametrize("text", ["[]", "{", '{"vit": {"ssf": "perhaps"}}', '{"vit": "works"}', '{"vit": {"ssf": 1}}'])
def test_a_file_that_is_no_matrix_is_refused(tmp_path, text):
    path = tmp_path / "matrix.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="matrix.json is not a matrix"):
        report.read_json(path)


def test_regressions():
    def found(now, before):
        rows = ({"vit": {"ssf": cell}} if cell else {} for cell in (now, before))
        return report.regressions(*rows)

    works, refused, fails, skipped = Cell("works"), Cell("not applicable", "a"), Cell("fails", "b"), Cell("skipped")
    assert found(refused, works) == ["ssf on vit: not applicable: a (before: works)"]
    assert found(fails, None) == ["ssf on vit: fails: b (before: not in the file)"]
    for before in (works, refused, fails, skipped):
        assert len(found(fails, before)) == 1
    for now, before in ((works, refused), (works, fails), (refused, refused), (skipped, works), (works, None)):
        assert found(now, before) == []


def test_markdown():
    text = report.to_markdown(MATRIX)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert report.COMMAND in text
    assert "| Plain transformers | 1 | 2 | 0 | 0 | 0 | 100.0 % |" in lines
    assert "| Convolutional networks | 1 | 0 | 1 | 0 | 1 | 0.0 % |" in lines
    assert "| Hierarchical transformers | 1 | 0 | 0 | 2 | 0 | - |" in lines
    assert "| ssf | ✓ |" in lines
    reasons = {line.partition(". ")[2]: line.partition(". ")[0] for line in lines if line[:1].isdigit()}
    assert reasons.keys() == {cell.reason for row in MATRIX.values() for cell in row.values() if cell.reason}
    assert f"| vpt | ✓ {reasons['no other image size: 17 tokens']} |" in lines
    assert f"| vpt | - {reasons['no tokens']} |" in lines
    assert f"| ssf | · {reasons['natten is not installed']} |" in lines
    assert (
        "| vit | ViTModel | `classifier` | 2 of 2 |" in lines or "| vit | ViTModel | `classifier` | 3 of 3 |" in lines
    )


def test_heads_and_what_is_read():
    lines = [" ".join(line.split()) for line in report.heads_table(["clip", "beit_segmentation"]).splitlines()]
    assert lines[2:] == [
        "| clip | CLIPVisionModel | `classifier` | 3 of 3 |",
        "| beit_segmentation | BeitModel | `fpn`, `decode_head`, `auxiliary_head` | 3 of 4 |",
    ]


def coverage(*arguments):
    return main(["coverage", "--methods", "ssf", "--architectures", "vit,dinov2", "--jobs", "1", *map(str, arguments)])


def test_command(tmp_path, capsys):
    written = tmp_path / "matrix.json"
    assert coverage("--json", written, "--markdown", tmp_path / "matrix.md") == 0
    expected = {"vit": {"ssf": Cell("works")}, "dinov2": {"ssf": Cell("works")}}
    assert report.read_json(written) == expected
    assert (tmp_path / "matrix.md").read_text(encoding="utf-8") == report.to_markdown(expected)
    assert report.summary(expected) in capsys.readouterr().out
    assert coverage("--check", written) == 0


def test_command_names_failures_and_regressions(tmp_path, capsys, monkeypatch):
    written = tmp_path / "matrix.json"
    written.write_text('{"vit": {"ssf": "works"}, "dinov2": {"ssf": "not applicable: x"}}')
    monkeypatch.setattr("hf_visual_peft.coverage.matrix.run_cell", lambda *_: Cell("not applicable", "x"))
    assert coverage() == 0
    assert coverage("--check", written) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "ssf on vit: not applicable: x (before: works)"
    monkeypatch.setattr("hf_visual_peft.coverage.matrix.run_cell", lambda *_: Cell("fails", "x"))
    assert coverage() == 1
    assert capsys.readouterr().err.splitlines()[-2:] == ["ssf on vit: fails: x", "ssf on dinov2: fails: x"]


def test_command_refuses_bad_arguments_before_it_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_visual_peft.coverage.matrix.run_row", lambda *_: pytest.fail("ran"))
    bad = tmp_path / "bad.json"
    bad.write_text("{}{")
    for arguments, named in (
        (["--methods", "no_such"], "no_such"),
        (["--architectures", "no_such"], "no_such"),
        (["--json", tmp_path / "no_such" / "a.json"], "--json"),
        (["--markdown", tmp_path], "--markdown"),
        (["--check", tmp_path / "no_such.json"], "no_such.json"),
        (["--check", bad], "bad.json"),
    ):
        assert coverage(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("hf-visual-peft coverage: error: ")
        assert named in error
    for arguments in (["--jobs", "0"], ["--jobs", "x"], ["--methods", ","]):
        with pytest.raises(SystemExit) as stopped:
            coverage(*arguments)
        assert stopped.value.code == 2


def test_the_committed_matrix_has_every_cell():
    """What the cells hold is looked at in part, by the fast cut; which there are costs nothing to know."""
    committed = report.read_json(COMMITTED)
    stale = "docs/coverage.json is older than the code: run `make coverage`"
    assert committed.keys() == MODELS.keys(), stale
    assert all(row.keys() == list_methods().keys() for row in committed.values()), stale


def test_the_page_has_the_reasons_of_the_committed_matrix():
    page = COMMITTED.with_suffix(".md").read_text(encoding="utf-8").partition("## Reasons\n")[2]
    reasons = {cell.reason for row in report.read_json(COMMITTED).values() for cell in row.values() if cell.reason}
    assert {line.partition(". ")[2] for line in page.splitlines() if line} == reasons, "run `make coverage`"


@pytest.mark.slow
def test_processes_find_what_one_finds():
    chosen = choose_cells(["ssf", "attnscale"], ["vit", "dinov3_vit"])
    assert run_matrix(chosen, jobs=2, progress=False) == run_matrix(chosen, jobs=1, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fast_cut_against_the_committed_matrix(name):
    (methods,) = choose_cells(architectures=[name], fast=True).values()
    committed = report.read_json(COMMITTED)
    assert report.regressions({name: run_row(name, methods)}, {name: committed[name]}) == []
