"""Methods with prompts in both towers equal their equations, written in plain torch, on CLIP and on SigLIP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dual_encoders import NAMES, classifier, images
from peft import get_peft_model
from test_language_methods import LABELS, compare, equation_of, features_of, randomised, text_by_hand, with_vectors
from torch import nn

import hf_visual_peft
from hf_visual_peft import GaussianAverage, ZeroShotClassifier, load_classifier
from hf_visual_peft.language.methods.plot import transport


def image_by_hand(base, family, tokens, patches=False):
    """Features of the images from their own tokens and learned ones, block by block."""
    vision, count = base.encoder.vision_model, len(tokens[0]) if tokens else 0
    x = vision.embeddings(images(family)["pixel_values"])

    def with_new(x, new):
        return torch.cat([x, new.expand(len(x), -1, -1)], 1)

    if tokens:
        x = with_new(x, tokens[0])
    x = vision.pre_layrnorm(x) if family == "clip" else x
    for number, block in enumerate(vision.encoder.layers):
        if number and number in tokens:
            x = with_new(x[:, :-count], tokens[number])
        x = block(x, None)
        x = x[0] if isinstance(x, tuple) else x
    x = vision.post_layernorm(x[:, : x.shape[1] - count])
    if family == "siglip":
        return vision.head(x)
    return base.encoder.visual_projection(x[:, 1:] if patches else x[:, 0])


def joint_by_hand(base, family, texts, tokens, position="end"):
    start = 1 if family == "clip" else 0
    rows = with_vectors(base, family, texts[0], position)
    deep = {number: (list(range(start, start + len(new))), new) for number, new in enumerate(texts) if number}
    return image_by_hand(base, family, dict(enumerate(tokens))), text_by_hand(base, family, rows, deep)


def same(model, base, family, by_hand, loss=None, weights=None):
    """Logits, loss and gradients are those of a function in plain torch of the weights."""
    output = model(**images(family), labels=LABELS)
    output.loss.backward()
    weights = [p.detach().clone().requires_grad_() for p in equation_of(model).parameters()]
    image, text = by_hand(weights)
    logits = compare(family, image, text)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)
    expected = F.cross_entropy(logits, LABELS) + (0 if loss is None else loss(image, text, logits))
    torch.testing.assert_close(output.loss, expected, atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(expected, weights)
    for parameter, gradient in zip(equation_of(model).parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-4, rtol=2e-3)


def adapted(base, config):
    return randomised(get_peft_model(base, config)).eval()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ivlp(base, family, checkpointing):
    config = hf_visual_peft.IVLPConfig(num_virtual_tokens=2, num_vision_tokens=3, init_text=None)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(base, config).train()
    assert model.peft_config["default"].depth == 2
    same(model, base, family, lambda weights: joint_by_hand(base, family, weights[:2], weights[2:]))
    assert base.encoder.vision_model.encoder.layers[0].gradient_checkpointing is checkpointing


def test_words_that_are_left_over_stay_before_the_name(base, family):
    model = get_peft_model(base, hf_visual_peft.IVLPConfig(init_text="abcd", depth=1))
    words = base.encoder.text_model.get_input_embeddings()(torch.tensor(base.tokenizer("abcd")["input_ids"]))
    start = 1 if family == "clip" else 0
    torch.testing.assert_close(equation_of(model).texts[0], words[start : start + 2], atol=0, rtol=0)
    texts = equation_of(model).text(type("View", (), {"classifier": base, "encode": base.encode_tokens}))
    expected = base.encode_texts([f"abcd {name.replace('_', ' ')}." for name in NAMES])
    torch.testing.assert_close(F.normalize(texts, dim=-1), expected)


def test_maple(base, family):
    model = adapted(base, hf_visual_peft.MaPLeConfig(init_text=None, depth=2))
    equation = equation_of(model)
    assert len(equation.coupling) == 2

    def by_hand(weights):
        texts, linears = weights[:2], weights[2:]
        tokens = [F.linear(text, *linears[2 * number : 2 * number + 2]) for number, text in enumerate(texts)]
        return joint_by_hand(base, family, texts, tokens)

    same(model, base, family, by_hand)


def test_promptsrc(base, family):
    config = hf_visual_peft.PromptSRCConfig(
        num_virtual_tokens=2, num_vision_tokens=2, init_text=None, depth=2, text_weight=5.0, image_weight=3.0
    )
    model = adapted(base, config)
    image0, text0 = (F.normalize(each, dim=-1).detach() for each in features_of(base, family))

    def distance(image, text, logits):
        own, frozen = logits.log_softmax(-1), compare(family, image0, text0).log_softmax(-1)
        return (
            5 * (F.normalize(text, dim=-1) - text0).abs().mean()
            + 3 * (F.normalize(image, dim=-1) - image0).abs().mean()
            + (frozen.exp() * (frozen - own)).sum() / logits.numel()
        )

    by_hand = lambda weights: joint_by_hand(base, family, weights[:2], weights[2:])  # noqa: E731
    same(model, base, family, by_hand, distance)


def test_upt(base, family):
    model = adapted(base, hf_visual_peft.UPTConfig(num_virtual_tokens=4, num_vision_tokens=3, hidden=8))
    names = [name for name, _ in equation_of(model).named_parameters()]

    def by_hand(weights):
        w = dict(zip(names, weights, strict=True))

        def linear(name, x):
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        def norm(name, x):
            return F.layer_norm(x, (8,), w[f"{name}.weight"], w[f"{name}.bias"])

        x = torch.cat([linear("text_down", w["text_prompts"]), linear("image_down", w["image_prompts"])])
        inner = norm("norm1", x)
        query, key, value = (inner @ w["attention.in_proj_weight"].T + w["attention.in_proj_bias"]).chunk(3, -1)
        x = x + linear("attention.out_proj", (query @ key.T / 8**0.5).softmax(-1) @ value)
        inner = linear("mlp.0", norm("norm2", x))
        x = x + linear("mlp.2", inner * torch.sigmoid(1.702 * inner))
        text, image = linear("text_up", x[:4]), linear("image_up", x[4:])
        return joint_by_hand(base, family, [text], [image], "middle")

    same(model, base, family, by_hand)


def test_plot(folders):
    base = classifier(folders["clip"])
    model = adapted(base, hf_visual_peft.PLOTConfig(num_prompts=2, num_virtual_tokens=3))
    output = model(**images("clip"), labels=LABELS)
    vectors = equation_of(model).vectors
    texts = F.normalize(
        torch.stack([text_by_hand(base, "clip", with_vectors(base, "clip", each)) for each in vectors]), dim=-1
    )
    patches = F.normalize(image_by_hand(base, "clip", {}, patches=True), dim=-1)
    logits = torch.zeros(3, 4)
    similarity = torch.einsum("bld,nkd->bkln", patches, texts)
    kernel, left, right = ((similarity - 1) / 0.1).exp(), torch.ones(3, 4, 4), torch.ones(3, 4, 2)
    for _ in range(100):
        before = left
        left = 0.25 / (kernel @ right[..., None])[..., 0]
        right = 0.5 / (left[:, :, None] @ kernel)[:, :, 0]
        if (left - before).abs().mean() < 1e-2:
            break
    plan = (left[..., None] * kernel * right[:, :, None]).detach()
    logits = torch.tensor(2.6592).exp() * (plan * similarity).sum((2, 3))
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)
    output.loss.backward()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, LABELS), vectors)
    torch.testing.assert_close(vectors.grad, gradient, atol=1e-4, rtol=1e-3)


def test_a_plan_moves_everything():
    similarity = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plan = transport(similarity)
    torch.testing.assert_close(plan.sum(1), torch.full((5, 3), 1 / 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.sum(2), torch.full((5, 7), 1 / 7), atol=0.02, rtol=0)
    assert transport(similarity.bfloat16()).dtype == torch.float32


def test_average_of_epochs_leaves_the_base_as_it_is(folders):
    model = adapted(classifier(folders["clip"], dtype=torch.bfloat16), hf_visual_peft.IVLPConfig(init_text=None))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    average, seen = GaussianAverage(model, 3, mean=2, std=0.5), []
    with pytest.raises(ValueError, match="0 of 3 epochs"):
        average.apply()
    for _ in range(3):
        for parameter in trained:
            nn.init.normal_(parameter)
        seen.append([p.detach().clone() for p in trained])
        average.update()
    with pytest.raises(ValueError, match="all of them are taken"):
        average.update()
    average.apply()
    weights = torch.tensor([-2.0, 0.0, -2.0]).exp()
    weights = weights / weights.sum()
    for index, parameter in enumerate(trained):
        expected = sum(weight * epoch[index] for weight, epoch in zip(weights, seen, strict=True))
        torch.testing.assert_close(parameter.detach(), expected)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    for wrong in ({"epochs": 0}, {"epochs": 2, "std": 0.0}, {"epochs": 2, "mean": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            GaussianAverage(model, **wrong)


@pytest.mark.parametrize("name", ["ivlp", "maple", "promptsrc", "upt"])
def test_new_names_are_those_of_a_classifier_that_had_them(base, family, folders, tmp_path, name):
    config = hf_visual_peft.list_language_methods()[name].config_cls()
    if hasattr(config, "init_text"):
        config.init_text = None
    model = adapted(base, config)
    model.save_pretrained(tmp_path)
    new = ["kite", "sea", "old town"]
    model.base_model.model.set_class_names(new)
    again = load_classifier(str(tmp_path), class_names=new)
    with torch.no_grad():
        torch.testing.assert_close(again(**images(family)).logits, model(**images(family)).logits)


def test_what_does_not_fit(folders):
    for family in ("siglip2", "align"):
        base = ZeroShotClassifier.from_pretrained(folders[family], class_names=NAMES)
        before = list(base.state_dict())
        for config in (hf_visual_peft.MaPLeConfig(init_text=None), hf_visual_peft.UPTConfig()):
            with pytest.raises(ValueError, match="takes no learned tokens: it is not a plain transformer"):
                get_peft_model(base, config)
        assert list(base.state_dict()) == before
    with pytest.raises(ValueError, match="not one projected token"):
        get_peft_model(classifier(folders["siglip"]), hf_visual_peft.PLOTConfig(num_virtual_tokens=2))
    base = classifier(folders["clip"])
    with pytest.raises(ValueError, match="depth is 3: must be an integer from 1 to 2 .the number of blocks"):
        get_peft_model(base, hf_visual_peft.IVLPConfig(depth=3))
    with pytest.raises(ValueError, match="must be at most 2, the number of tokens"):
        get_peft_model(base, hf_visual_peft.IVLPConfig(num_virtual_tokens=5, init_text="ab"))
    model = get_peft_model(base, hf_visual_peft.IVLPConfig(init_text=None))
    with pytest.raises(ValueError, match="acts inside the image tower"):
        model(image_features=torch.randn(2, 12))
    with pytest.raises(ValueError, match="one of them, not both"):
        model()
