"""Models with adapters leave Python: by torch.export as they are, and merged ones by ONNX too."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from families import FAMILIES, video
from test_conformance import OF_EACH_KIND, VARIANTS, adapted, run

from hf_visual_peft.coverage.plain import PATCHED


VIT = FAMILIES["vit"]
# one variant of each: merged, all are the same plain model with other weights
MERGEABLE = list({variant[0].name: variant for variant in VARIANTS if variant[0].mergeable}.values())
TO_ONNX = (
    "bitfit",
    "fact",
    "repadapter",
    "ssf",
)  # they change biases, weights, affine maps, or norms
ONNX_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch):
    """Tracing takes long, and looks at every block anew."""
    monkeypatch.setitem(PATCHED, "num_hidden_layers", 2)


def over(variants):
    return pytest.mark.parametrize(("method", "fields"), [pytest.param(m, f, id=name) for m, f, name in variants])


def exported(model, inputs):
    with torch.no_grad():
        return torch.export.export(model, (), kwargs=dict(inputs))


def assert_same(program, model, family):
    with torch.no_grad():
        assert torch.equal(program.module()(**family.inputs(2)).logits, run(model, family))


def base_logits(family, model):
    with model.disable_adapter():
        return run(model, family)


@over({method.name: (method, fields, name) for method, fields, name in reversed(VARIANTS)}.values())
def test_adapted_models_are_exported(method, fields, tmp_path):
    family = video(VIT, method) if method.video else VIT
    model = adapted(method, fields, family)
    program = exported(model, family.inputs(2))
    if method.name in OF_EACH_KIND:
        torch.export.save(program, tmp_path / "model.pt2")
        program = torch.export.load(tmp_path / "model.pt2")
    assert_same(program, model, family)
    assert not torch.equal(run(model, family), base_logits(family, model))


@over(MERGEABLE)
def test_merged_models_are_exported_and_run_in_onnxruntime(method, fields, tmp_path):
    model = adapted(method, fields, VIT)
    before = run(model, VIT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gets a bias by merging")
        merged = model.merge_and_unload()
    program = exported(merged, VIT.inputs(2))
    assert_same(program, merged, VIT)
    if method.name not in TO_ONNX:
        return

    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(program, f=tmp_path / "model.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": VIT.inputs(2)["pixel_values"].numpy()})
    np.testing.assert_allclose(logits, before, rtol=0, atol=ONNX_TOLERANCE * before.abs().max().item())
