"""The benchmark of accuracy: what it chooses, how it goes on after a kill, and what its page says."""

from __future__ import annotations

import json
from dataclasses import asdict

import accuracy
import pytest
from families import FAMILIES
from peft import LNTuningConfig, LoraConfig

import hf_visual_peft


SEEDS = [0, 1, 2]


def fake(method, lr, seed, validation=0.5, test=0.6, **protocol):
    shared = asdict(accuracy.Protocol()) | protocol
    return accuracy.Run(method, lr, seed, 1000, 2000, validation, test, 3.0, shared)


class Trainer:
    """Stands for training: validation is best at 3e-3, where the test digits are worst."""

    def __init__(self):
        self.calls = []

    def __call__(self, method, lr, seed):
        self.calls.append((method, lr, seed))
        return fake(method, lr, seed, validation=0.9 if lr == 3e-3 else 0.8, test=0.5 if lr == 3e-3 else 0.9)


def test_validation_chooses_the_learning_rate_and_a_killed_run_goes_on(tmp_path):
    path, protocol = tmp_path / "runs.jsonl", accuracy.Protocol()
    train = Trainer()

    def save(run):
        accuracy.append_result(path, run)
        if len(train.calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy.measure("vpt", SEEDS, [], train, save)
    with path.open("a") as file:
        file.write('{"method": "vpt", "lr"')  # a line that was cut off

    rest = Trainer()
    done = accuracy.read_results(path, protocol)
    assert len(done) == 4
    accuracy.measure("vpt", SEEDS, done, rest, lambda run: accuracy.append_result(path, run))
    assert train.calls + rest.calls == [*(("vpt", lr, 0) for lr in accuracy.RATES), ("vpt", 3e-3, 1), ("vpt", 3e-3, 2)]
    done = accuracy.read_results(path, protocol)
    assert [(r.lr, r.seed) for r in accuracy.chosen_runs("vpt", SEEDS, done)] == [(3e-3, 0), (3e-3, 1), (3e-3, 2)]
    again = Trainer()
    accuracy.measure("vpt", SEEDS, done, again, lambda run: None)
    assert not again.calls


def test_results_of_another_protocol_are_left_out(tmp_path):
    path = tmp_path / "runs.jsonl"
    accuracy.append_result(path, fake("vpt", 1e-3, 0))
    accuracy.append_result(path, fake("vpt", 3e-3, 0, epochs=1))
    assert [run.lr for run in accuracy.read_results(path, accuracy.Protocol())] == [1e-3]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def test_page():
    done = [fake(m, lr, 0, validation=0.5 + lr) for m in ("linearprobe", "vpt") for lr in accuracy.RATES]
    done += [fake("linearprobe", 1e-2, seed, test=0.7) for seed in (1, 2)]
    done += [fake("vpt", 1e-2, seed, test=0.3 * seed) for seed in (1, 2)]
    longer = [fake("vpt", lr, 0, test=10 * lr, epochs=accuracy.LONGER.epochs) for lr in accuracy.RATES]
    page = accuracy.report(["linearprobe", "ssf", "vpt"], SEEDS, done, accuracy.Protocol(), longer)
    lines = page.splitlines()
    probe, vpt = (next(line for line in lines if line.startswith(f"| {name} ")) for name in ("linearprobe", "vpt"))
    assert [cell.strip() for cell in probe.split("|")[4:7]] == ["66.7", "5.8", "0.01"]
    assert [cell.strip() for cell in vpt.split("|")[4:7]] == ["50.0", "17.3", "0.01"]
    assert page.index(probe) < page.index(vpt)
    assert "Below the linear probe: vpt." in page
    assert "With 40 epochs and one seed, all else as above: vpt 1.0 (at 0.001)." in page
    assert "Not measured yet: ssf." in page
    assert max(map(len, lines)) <= 119
    assert "best of 0.001, 0.003, 0.01 (full fine-tuning: 3e-05, 0.0001, 0.0003) on 200" in " ".join(lines)


def test_configs():
    base = FAMILIES["dinov2"].model()
    lora, dora, norms = (accuracy.config_of(f"peft-{name}", base, 32) for name in ("lora", "dora", "ln-tuning"))
    assert isinstance(lora, LoraConfig)
    assert isinstance(norms, LNTuningConfig)
    assert lora.target_modules == {
        f"dinov2.encoder.layer.{i}.attention.{name}" for i in range(3) for name in ("q_proj", "v_proj")
    }
    assert (lora.use_dora, dora.use_dora) == (False, True)
    assert lora.modules_to_save == norms.modules_to_save == ["classifier"]
    assert accuracy.config_of("full", base, 32) is None
    assert accuracy.config_of("attnscale", base, 24).grid_size == 3
    assert type(accuracy.config_of("ssf", base, 32)) is hf_visual_peft.SSFConfig


def test_unknown_method(capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--methods", "vpt,aim"])
    assert "--methods aim: choose from" in capsys.readouterr().err
