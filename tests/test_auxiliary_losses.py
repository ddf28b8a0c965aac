"""Auxiliary losses: their value, who adds them, and that no way of training counts them twice or drops them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from packaging.version import Version
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hf_visual_peft import CoLinConfig, SSFConfig, VPTConfig, auxiliary_loss
from hf_visual_peft.coverage.models import MODELS


WEIGHT = 0.3
NO_HEAD = {"modules_to_save": []}
LABELS = torch.tensor([0, 1, 2, 0])


def config(**fields):
    return CoLinConfig(**{"r": 6, "rank": 3, "orthogonality": WEIGHT, "init_weights": False} | fields)


def adapted(*configs, name="vit"):
    torch.manual_seed(1)
    model = get_peft_model(FAMILIES[name].model(), configs[0] if configs else config())
    for number, other in enumerate(configs[1:], 1):
        model.add_adapter(f"other{number}", other)
    return model.train()


def inputs(count=4):
    return FAMILIES["vit"].inputs(count)


def expected(model, adapter="default", weight=WEIGHT):
    """The loss of CoLin's adapter, from the weights by their names."""
    total = 0.0
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and name.endswith((".down.down", ".up.down", ".down.up", ".up.up")):
            gram = parameter.T @ parameter if name.endswith(".down") else parameter @ parameter.T
            total = total + weight * (gram - torch.eye(len(gram))).square().sum()
    return total


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, wanted, scale=1.0):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], scale * value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_model_adds_it_to_the_loss_that_it_returns():
    model = adapted()
    for kwargs in ({}, {"return_dict": False}):
        out = model(**inputs(), labels=LABELS, **kwargs)
        loss, logits = (out.loss, out.logits) if not kwargs else out
        torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS) + expected(model))
    assert torch.is_grad_enabled()
    model.eval()  # also where a user keeps the model in evaluation mode
    out = model(**inputs(), labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS) + expected(model))
    with torch.no_grad():
        out = model(**inputs(), labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS))


def test_the_public_function_gives_the_same_gradients():
    model = adapted()
    model(**inputs(), labels=LABELS).loss.backward()
    wanted = gradients(model)
    logits = model(**inputs()).logits
    (F.cross_entropy(logits, LABELS) + auxiliary_loss(model)).backward()
    assert_same(gradients(model), wanted)
    assert auxiliary_loss(model) == 0  # it is taken
    model(**inputs(), labels=LABELS)
    with pytest.raises(ValueError, match="has added the auxiliary losses to its loss itself"):
        auxiliary_loss(model)
    assert auxiliary_loss(get_peft_model(FAMILIES["vit"].model(), VPTConfig())) == 0
    assert auxiliary_loss(FAMILIES["vit"].model()) == 0


@pytest.mark.parametrize("name", ["timm_vit", "swin", "vitdet"])
def test_models_of_other_kinds(name):
    """Of timm, with windows, and with no loss of their own."""
    tiny = MODELS[name]
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), config()).train()
    tiny.call(model, tiny.arguments(2))
    torch.testing.assert_close(auxiliary_loss(model), expected(model))


def test_only_active_adapters_count():
    model = adapted(config(), config(orthogonality=2.0, **NO_HEAD), config(orthogonality=0.0, **NO_HEAD))
    both = expected(model) + expected(model, "other1", 2.0)

    def added():
        model(**inputs())
        return auxiliary_loss(model)

    torch.testing.assert_close(added(), expected(model))
    model.set_adapter("other1")
    torch.testing.assert_close(added(), expected(model, "other1", 2.0))
    model.base_model.set_adapter(["default", "other1", "other2"])
    torch.testing.assert_close(added(), both)
    with model.disable_adapter():
        assert added() == 0
        out = model(**inputs(), labels=LABELS)
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS))
    model.set_adapter("other1")
    model.delete_adapter("default")
    torch.testing.assert_close(added(), expected(model, "other1", 2.0))
    model.set_adapter("other2")
    assert added() == 0
    base = model.unload()
    assert not base._forward_hooks
    assert not base._forward_pre_hooks


def test_an_adapter_of_another_method_beside_it():
    model = FAMILIES["vit"].model()
    model.add_adapter(config(**NO_HEAD), "first")
    model.add_adapter(SSFConfig(**NO_HEAD), "second")
    model.set_adapter(["first", "second"])
    out = model(**inputs(), labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS) + expected(model, "first"))


def test_copies_and_pickles_have_hooks_of_their_own():
    model = adapted()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        other(**inputs())
        assert auxiliary_loss(model) == 0
        torch.testing.assert_close(auxiliary_loss(other), expected(other))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_it_once(reentrant):
    model = adapted()

    def both_passes():
        first = model(**inputs(), labels=LABELS).loss
        with torch.no_grad():
            model(**inputs(2))  # another pass comes in between, which asks for no loss
        (first + model(**inputs(2), labels=LABELS[:2]).loss).backward()
        return gradients(model)

    wanted = both_passes()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**inputs())
    torch.testing.assert_close(auxiliary_loss(model), expected(model))
    assert_same(both_passes(), wanted)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_trainer_accumulates_its_mean(steps, tmp_path):
    """`Trainer` divides the task's loss by all samples of a step itself; the auxiliary one must not grow with them."""
    model = adapted()
    model(**inputs(), labels=LABELS).loss.backward()
    wanted = gradients(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    pixels = inputs()["pixel_values"]
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, LABELS, strict=True)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=4 // steps,
        gradient_accumulation_steps=steps,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    Trainer(model, arguments, train_dataset=samples).train()
    found = {name: (before[name] - p.detach()) / 0.01 for name, p in model.named_parameters() if name in before}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_whoever_leaves_it_out_is_told_once(tmp_path):
    model = adapted()
    pixels = inputs()["pixel_values"]
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, LABELS, strict=True)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, label_smoothing_factor=0.1, use_cpu=True, disable_tqdm=True, report_to=[]
    )
    with pytest.warns(UserWarning, match="auxiliary loss of 'default' is not in the loss") as told:
        Trainer(model, arguments, train_dataset=samples).train()
    assert sum("auxiliary loss" in str(each.message) for each in told) == 1


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"), reason="torch.compile of torch 2.11 fails at outputs"
)
def test_compiled_models_add_it_and_check_it():
    model = adapted()
    wanted = model(**inputs(), labels=LABELS).loss
    wanted.backward()
    plain = gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs(), labels=LABELS).loss
    found.backward()
    torch.testing.assert_close(found, wanted)
    assert_same(gradients(model), plain)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "1.adapters.colin_mlp.default.up.up" in name).fill_(
            float("nan")
        )
    with pytest.raises(ValueError, match="auxiliary loss of the adapter 'default' .CoLinConfig. at '.*1'"):
        compiled(**inputs(), labels=LABELS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_loss_that_is_not_finite_names_adapter_and_module(value):
    model = adapted(config(), config(**NO_HEAD))
    model.base_model.set_adapter(["default", "other1"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    broken = next(
        p for name, p in model.named_parameters() if "layers.1.adapters.colin_attention.other1.up.up" in name
    )
    with torch.no_grad():
        kept = broken.clone()
        broken.fill_(value)
    message = r"The auxiliary loss of the adapter 'other1' \(CoLinConfig\) at '.*\.1' is not finite"
    with pytest.raises(ValueError, match=message):
        model(**inputs(), labels=LABELS)
    model(**inputs())
    with pytest.raises(ValueError, match=message):
        auxiliary_loss(model)
    with torch.no_grad():
        broken.copy_(kept)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    model(**inputs(), labels=LABELS).loss.backward()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"orthogonality": -1.0}, "CoLinConfig.orthogonality is -1.0: must be a finite number of at least 0"),
        ({"orthogonality": float("nan")}, "CoLinConfig.orthogonality is nan"),
        ({"rank": 7}, r"CoLinConfig.rank is 7: must be an integer from 1 to 6 \(r\)"),
        ({"r": 0}, "CoLinConfig.r is 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)
