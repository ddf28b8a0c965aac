from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import hf_visual_peft
from hf_visual_peft.core.registry import Paper, VisualPeftType, register


def test_methods_are_peft_types():
    methods = hf_visual_peft.list_methods()
    assert list(methods) == sorted(methods)
    assert {"adaptformer", "convpass", "ssf", "vpt"} <= set(methods)
    for name, method in methods.items():
        assert hf_visual_peft.get_method(name.upper()) is method
        assert PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type] is method.config_cls
        assert PEFT_TYPE_TO_CONFIG_MAPPING[name.upper()] is method.config_cls
        assert PEFT_TYPE_TO_TUNER_MAPPING[method.peft_type] is method.tuner_cls
        assert PEFT_TYPE_TO_PREFIX_MAPPING[method.peft_type] == method.tuner_cls.prefix == f"{name}_"
        assert getattr(hf_visual_peft, method.config_cls.__name__) is method.config_cls
        assert method.config_cls().peft_type == method.peft_type == method.peft_type.value == method.peft_type.name
        assert method.paper.url.startswith("https://")
        assert method.counts


def test_every_method_file_stands_in_its_survey_folder():
    folder = Path(hf_visual_peft.__file__).parent / "methods"
    files = {path.parent.name: path for path in folder.glob("*/*.py") if path.name != "__init__.py"}
    for method in hf_visual_peft.list_methods().values():
        assert method.category in files
        assert Path(sys.modules[method.config_cls.__module__].__file__).parent.name == method.category


def test_every_field_is_told_in_docstring_and_help():
    for method in hf_visual_peft.list_methods().values():
        bases = [base for base in method.config_cls.__mro__ if issubclass(base, hf_visual_peft.VisualPeftConfig)]
        documented = "".join(base.__doc__ for base in bases)
        for field in dataclasses.fields(method.config_cls):
            if field.name in {f.name for f in dataclasses.fields(hf_visual_peft.VisualPeftConfig)}:
                continue
            assert f"        {field.name}: " in documented, (method.name, field.name)
            assert field.metadata["help"]


def test_unknown_method():
    with pytest.raises(
        ValueError, match="Unknown method 'nope': choose one of " + ", ".join(hf_visual_peft.list_methods())
    ):
        hf_visual_peft.get_method("nope")


def test_names_that_are_taken():
    arguments = {
        "paper": Paper("", "", ""),
        "visual_tuning": "fine-tuning",
        "equation": "",
        "counts": (),
        "mergeable": False,
        "identity_at_start": True,
    }
    for name in ("lora", "vpt"):
        with pytest.raises(ValueError, match=f"peft already has a method named '{name}'"):
            register(name=name, **arguments)(type("TakenConfig", (), {"__module__": __name__}))


def test_type_is_its_string():
    kind = VisualPeftType("VPT")
    assert {kind: 1}["VPT"] == {"VPT": 1}[kind] == 1
    assert f"{kind}" == kind.value == "VPT"


def test_every_file_is_registered_once_in_a_new_process():
    code = (
        "import hf_visual_peft, importlib; print(len(hf_visual_peft.list_methods()), len(set(hf_visual_peft.__all__)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == len(hf_visual_peft.list_methods())
    assert int(out[1]) == len(hf_visual_peft.__all__)
