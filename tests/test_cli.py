"""The `hf-visual-peft` command."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hf_visual_peft
from hf_visual_peft.cli.commands import COMMANDS, answer
from hf_visual_peft.cli.main import _parser, main
from hf_visual_peft.peft_methods.methods import PEFT_METHODS
from hf_visual_peft.tables import format_table


def _rows(text):
    """The lines of a terminal's tables by their first word; what wraps joined."""
    rows, name = {}, None
    for line in text.splitlines():
        if line[:1].isalpha():
            name = line.split()[0]
            rows[name] = line
        elif line[:1] == " " and name:
            rows[name] += line
    return {name: " ".join(line.split()) for name, line in rows.items()}


@pytest.mark.parametrize("columns", [80, 200])
def test_methods_table_has_every_method_and_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    rows = _rows(text)
    for name, method in hf_visual_peft.list_methods().items():
        assert f"{method.counts[0][1]:,}" in rows[name]
        assert f" {'yes' if method.mergeable else 'no'}" in rows[name]
        if columns == 200:
            assert method.summary in rows[name]
        assert method.category.capitalize() in text
    assert set(PEFT_METHODS) | set(hf_visual_peft.list_language_methods()) <= set(rows)
    assert "LoraConfig(use_dora=True)" in rows["dora"]


def test_every_method_has_a_summary():
    for method in hf_visual_peft.list_methods().values():
        assert method.summary, f"{method.name}: give `register` a summary"
        assert not method.summary.endswith(".")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vpt", ["## VPTConfig", "460,800 (num_virtual_tokens=50, deep=True)", "`deep` (True)"]),
        ("VPTConfig", ["## VPTConfig"]),
        ("coop", ["## CoOpConfig", "For a `ZeroShotClassifier`"]),
        ("lora", ["## lora", "LoraConfig", "query and value"]),
    ],
)
def test_one_method_whole(name, words, capsys):
    assert main(["methods", name]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words), text


def test_one_method_as_json(capsys):
    assert main(["methods", "ssf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == "SSFConfig"


@pytest.mark.parametrize(
    ("name", "hint"), [("adaptfromer", "'adaptformer'"), ("zzz", "`hf-visual-peft methods` lists")]
)
def test_an_unknown_method_gets_close_names(name, hint, capsys):
    assert main(["methods", name]) == 1
    message = capsys.readouterr().err
    assert f"Unknown method '{name}'" in message
    assert hint in message


def test_help_of_the_launcher_is_that_of_the_package():
    """The launcher answers without importing the package; its commands and the package's are the same."""
    package = _parser()
    (commands,) = (action for action in package._actions if action.dest == "command")
    assert {choice.dest: choice.help for choice in commands._choices_actions} == COMMANDS
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(io.StringIO()) as page:
        answer(["--help"], "1.0")
    assert stopped.value.code == 0
    assert page.getvalue() == package.format_help()


def test_help_and_version_import_nothing_heavy():
    launcher = Path(hf_visual_peft.__file__).parent / "cli" / "launcher"
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'peft' in sys.modules)); "
    code += "import hf_visual_peft_command; hf_visual_peft_command.main()"
    environment = os.environ | {"PYTHONPATH": f"{launcher}{os.pathsep}{launcher.parents[2]}"}
    for flag, words in (("--help", "compare methods on your images"), ("--version", hf_visual_peft.__version__)):
        command = [sys.executable, "-c", code, flag]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert words in done.stdout
        assert done.stdout.endswith("False False\n")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_flags_and_choices(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("compare", "--train_dir", "--budget", "torch_export", "--model_name_or_path"):
        assert word in script, word


@pytest.mark.slow
def test_a_reader_that_stops_early_is_no_error():
    command = (
        f"{shlex.quote(sys.executable)} -m hf_visual_peft.cli.main methods --json | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[\n0\n"
    assert done.stderr == ""


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


@pytest.mark.parametrize(
    "words", [["roles", "no"], ["explain", "no"], ["methods", "no"], ["coverage", "--methods", "no"]]
)
def test_errors_of_all_commands_look_alike(words, monkeypatch, capsys):
    def broken(*_, **__):
        raise ValueError("first line\n  second   line")

    for place in ("cli.roles.load_model", "cli.catalogue.describe_method", "coverage.command.run"):
        monkeypatch.setattr(f"hf_visual_peft.{place}", broken)
    assert main(words) == 1
    assert capsys.readouterr().err == f"hf-visual-peft {words[0]}: error: first line second line\n"


def test_the_page_of_the_command_line_lists_every_command():
    page = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(COMMANDS)


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
