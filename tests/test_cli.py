"""The `hf-visual-peft` command."""

import json
import subprocess
import sys

import pytest

import hf_visual_peft
from hf_visual_peft.cli.main import main
from hf_visual_peft.peft_methods.methods import PEFT_METHODS
from hf_visual_peft.tables import format_table


def test_methods_table_has_every_method(capsys):
    assert main(["methods"]) == 0
    ours, of_peft = (table.splitlines() for table in capsys.readouterr().out.split("\n\n"))
    for lines in (ours, of_peft):
        assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in of_peft[2:]] == list(PEFT_METHODS)
    assert "| dora           | LoraConfig        | use_dora=True |" in of_peft[2 + list(PEFT_METHODS).index("dora")]
    lines = ours
    for name, method in hf_visual_peft.list_methods().items():
        (line,) = (line for line in lines if line.startswith(f"| {name} "))
        assert method.category in line
        assert method.paper.title in line
        assert (f"arXiv {method.paper.arxiv}" if method.paper.arxiv else method.paper.url) in line
        assert "None" not in line
        assert f"{method.counts[0][1]:,}" in line
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[-2] == ("yes" if method.mergeable else "no")
        assert "backbone" in cells[-1]


def test_methods_json_says_what_the_registry_says(capsys):
    assert main(["methods", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listing] == list(hf_visual_peft.list_methods())
    for entry in listing:
        method = hf_visual_peft.get_method(entry["name"])
        assert entry["config"] == method.config_cls.__name__
        assert entry["category"] == method.category
        assert entry["visual_tuning"] == method.visual_tuning
        assert entry["calibrated"] is method.calibrated
        assert entry["video"] is method.video
        assert entry["mergeable"] is method.mergeable
        assert entry["gradients_through_backbone"] == method.gradients
        assert entry["paper"]["url"] == method.paper.url
        assert entry["paper"]["arxiv"] == method.paper.arxiv
        counts = [count["parameters"] for count in entry["trainable_on_vit_b16"]]
        assert counts == [count for _, count in method.counts]


@pytest.mark.slow
def test_methods_as_a_process():
    command = [sys.executable, "-m", "hf_visual_peft.cli.main", "methods", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {entry["name"] for entry in json.loads(done.stdout)} == set(hf_visual_peft.list_methods())


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"hf-visual-peft {hf_visual_peft.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["methods", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "usage: hf-visual-peft" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["demo", "--epochs", "many"],
        ["demo", "--no_such_flag"],
        ["methods", "--json", "--markdown"],
    ],
)
def test_arguments_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: hf-visual-peft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "vtp"], "Unknown method 'vtp': choose one of"),
        (["--method", "aim"], "method='aim' takes videos, and the demonstration has images."),
        (["--method", "vpt,stadapter"], "method='stadapter' takes videos, and the demonstration has images."),
        (["--epochs", "0"], "epochs=0: choose an integer from 1"),
        (["--lr", "-1"], "lr=-1.0: choose a number above 0"),
        (["--train_size", "5000"], "there are 5000 digits"),
        (["--test_split", "test"], "test_split='test' applies to other datasets"),
    ],
)
def test_demo_with_a_bad_value_says_so_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["demo", "--output_dir", str(tmp_path / "out"), *arguments]) == 1
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("hf-visual-peft demo: error: ")
    assert message in printed
    assert "\n" not in printed


def test_demo_traceback_on_demand(tmp_path):
    with pytest.raises(ValueError, match="Unknown method"):
        main(["demo", "--method", "vtp", "--output_dir", str(tmp_path / "out"), "--traceback"])


def test_table_aligns_numbers_right():
    table = format_table(("name", "n"), [("a", "1,000"), ("longer", "2")], right=("n",))
    assert table.splitlines() == [
        "| name   |     n |",
        "| ------ | ----: |",
        "| a      | 1,000 |",
        "| longer |     2 |",
    ]
