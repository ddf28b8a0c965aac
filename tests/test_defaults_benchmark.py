import argparse

import defaults
import numpy as np
import pytest
import torch
import training_options
from defaults import CHOSEN, Setting, augment, best_augmentation, best_rate, methods, rate_of, report, settings
from lines import read_lines

import hf_visual_peft


ROWS = list(read_lines(defaults.ROOT / "benchmarks" / "defaults.jsonl"))


def row(rate, data, validation, method="vpt"):
    crop, flip = CHOSEN
    return {**vars(Setting(method, data, rate, crop=crop, flip=flip)), "validation": validation, "test": validation}


def test_the_rate_that_loses_least_to_the_best_of_each_set_is_chosen():
    rows = [row(1e-3, "digits", 0.9), row(1e-3, "emoji", 0.5), row(1e-3, "textile", 0.7)]
    assert best_rate(rows, "vpt") is None  # one rate is not a choice
    rows += [row(3e-3, "digits", 0.8), row(3e-3, "emoji", 0.7), row(3e-3, "textile", 0.7)]
    assert best_rate(rows, "vpt") == 3e-3
    rows += [row(1e-2, "digits", 1.0), row(1e-2, "emoji", 1.0)]
    assert best_rate(rows, "vpt") == 3e-3  # not all sets have been run at the third


@pytest.mark.parametrize("method", methods())
def test_the_default_of_a_method_is_what_was_measured(method):
    measured = best_rate(ROWS, method)
    assert measured is None or rate_of(method) == measured


def test_the_page_is_what_the_results_say(monkeypatch):
    """A new method is on the page once it was measured; until then nothing here asks for it."""
    page = (defaults.ROOT / "docs" / "defaults.md").read_text(encoding="utf-8")
    measured = {row["method"] for row in ROWS}
    monkeypatch.setattr(defaults, "methods", lambda: [n for n in methods() if n in measured or f"| {n} " in page])
    assert page == report(ROWS)


def test_the_augmentation_of_the_first_runs_is_best_and_the_default():
    assert best_augmentation(ROWS) == CHOSEN
    training = hf_visual_peft.get_method("vpt").training
    assert (training.crop_scale, training.horizontal_flip) == CHOSEN
    following = [setting for setting in settings(ROWS, None) if setting.method == "fact"]
    assert {(setting.crop, setting.flip) for setting in following} == {CHOSEN}


def test_pictures_are_mirrored_and_cropped_within_their_bounds():
    x = torch.linspace(0, 1, 16).expand(8, 3, 16, 16)  # rises from left to right
    generator = torch.Generator().manual_seed(0)
    assert augment(x, Setting("", "", 0.0), generator) is x
    mirrored = augment(x, Setting("", "", 0.0, flip=1.0), generator)
    np.testing.assert_allclose(mirrored, x.flip(-1), atol=1e-5)
    crops = augment(x, Setting("", "", 0.0, crop=0.5), generator)
    assert crops.min() >= 0
    assert crops.max() <= 1
    widths = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert (widths > 0.5).all()  # at least half of the area, with sides of 3 : 4 to 4 : 3
    assert (widths < 1).any()


def flags(**given):
    empty = dict.fromkeys((*vars(hf_visual_peft.get_method("vpt").training), "learning_rate"))
    return argparse.Namespace(**{**empty, "method": "vpt", "optim": "adamw_torch", **given})


@pytest.mark.parametrize(("method", "rate"), [("convpass", 1e-3), ("ssf", 3e-3), ("linear", 1e-2), ("lora", 1e-3)])
def test_the_recipe_takes_what_suits_the_method_where_nothing_is_given(method, rate):
    args = flags(method=method, weight_decay=0.3)
    training_options.fill_defaults(args)
    assert (args.learning_rate, args.weight_decay, args.crop_scale, args.num_warmup_steps) == (rate, 0.3, 0.5, 0.1)
    assert "weight_decay" not in args.by_default


@pytest.mark.parametrize("optim", ["sgd", "rmsprop"])
def test_another_optimizer_needs_a_learning_rate_of_its_own(optim):
    with pytest.raises(ValueError, match=f"--optim {optim} needs --learning_rate.*0.003, is for adamw_torch"):
        training_options.fill_defaults(flags(optim=optim))
    args = flags(optim=optim, learning_rate=0.1)
    training_options.fill_defaults(args)
    assert args.learning_rate == 0.1
