"""Each method for class texts equals its equation, written in plain torch from its paper, on CLIP and on SigLIP."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import language_gradients
import pytest
import torch
import torch.nn.functional as F
from dual_encoders import NAMES, classifier, clip_tokenizer, images
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

import hf_visual_peft
from hf_visual_peft import ZeroShotClassifier, load_classifier
from hf_visual_peft.language.support import SupportEquation


LABELS = torch.tensor([0, 3, 2])
SCALE = {"clip": 2.6592, "siglip": 2.0}
BIAS = {"clip": 0.0, "siglip": -3.0}


def equation_of(model):
    return model.base_model.model.adapters.active()


def compare(family, image, text):
    cosine = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    return cosine * torch.tensor(SCALE[family]).exp() + BIAS[family]


def features_of(base, family):
    """Features of the images, and those of the classes by the template."""
    output = base.encoder.get_image_features(**images(family)).pooler_output
    tokens = base.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])["input_ids"]
    return output, text_by_hand(
        base, family, [base.encoder.text_model.get_input_embeddings()(torch.tensor(row)) for row in tokens]
    )


def text_by_hand(base, family, rows, deep=None):
    """Features of texts from the vectors of their tokens, block by block.

    `deep`: by block, what stands at the slots of its input, as (slots, vectors).
    """
    text, found = base.encoder.text_model, []
    for index, vectors in enumerate(rows):
        length = len(vectors)
        if family == "siglip":
            pad = text.get_input_embeddings().weight[0]
            vectors = torch.cat([vectors, pad.expand(40 - length, -1)])
        x = (vectors + text.embeddings.position_embedding.weight[: len(vectors)])[None]
        mask = None
        if family == "clip":
            mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        for number, block in enumerate(text.encoder.layers):
            if deep and number in deep:
                slots, new = deep[number]
                x = x.clone()
                x[:, slots] = new[index] if new.ndim == 3 else new
            x = block(x, mask)
            x = x[0] if isinstance(x, tuple) else x
        x = text.final_layer_norm(x)[0]
        found.append(base.encoder.text_projection(x[-1]) if family == "clip" else text.head(x[-1]))
    return torch.stack(found)


def embedded(base, text):
    return base.encoder.text_model.get_input_embeddings()(torch.tensor(base.tokenizer(text)["input_ids"]))


def with_vectors(base, family, vectors, position="end", names=NAMES):
    """The vectors of the texts' tokens with learned ones in them; a letter is a token."""
    start, rows = (1 if family == "clip" else 0), []
    for index, name in enumerate(names):
        own = vectors if vectors.ndim == 2 else vectors[index]
        tokens = embedded(base, f"{name.replace('_', ' ')}.")
        letters = len(name.replace("_", "").replace(" ", ""))
        half = {"end": len(own), "front": 0, "middle": len(own) // 2}[position]
        parts = [tokens[:start], own[:half], tokens[start : start + letters], own[half:], tokens[start + letters :]]
        rows.append(torch.cat(parts))
    return rows


def randomised(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["front", "middle", "end"])
def test_coop(base, family, specific, position):
    config = hf_visual_peft.CoOpConfig(num_virtual_tokens=5, class_specific=specific, position=position)
    model = randomised(get_peft_model(base, config))
    output = model(**images(family), labels=LABELS)
    output.loss.backward()
    vectors = equation_of(model).vectors.detach().clone().requires_grad_()
    assert vectors.shape == ((4, 5, 16) if specific else (5, 16))
    image, _ = features_of(base, family)
    text = text_by_hand(base, family, with_vectors(base, family, vectors, position))
    expected = compare(family, image, text)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    F.cross_entropy(expected, LABELS).backward()
    torch.testing.assert_close(equation_of(model).vectors.grad, vectors.grad, atol=1e-4, rtol=1e-3)
    assert vectors.grad.abs().max() > 0


def test_words_to_start_from_are_the_zero_shot_classifier(base, family):
    expected = base(**images(family)).logits
    model = get_peft_model(base, hf_visual_peft.CoOpConfig(init_text="a photo of a"))
    assert model.peft_config["default"].num_virtual_tokens == len("aphotoofa")
    torch.testing.assert_close(model(**images(family)).logits, expected)


def test_kgcoop(base, family):
    model = randomised(get_peft_model(base, hf_visual_peft.KgCoOpConfig(weight=3.0)))
    output = model(**images(family), labels=LABELS)
    image, text0 = features_of(base, family)
    text = text_by_hand(base, family, with_vectors(base, family, equation_of(model).vectors))
    loss = F.cross_entropy(compare(family, image, text), LABELS)
    loss = loss + 3.0 * (1 - F.cosine_similarity(text, text0).mean())
    torch.testing.assert_close(output.loss, loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("chunk", "checkpointing"), [(256, False), (3, False), (256, True)])
def test_tcp(folders, family, chunk, checkpointing):
    base = classifier(folders[family], class_chunk=chunk)
    if checkpointing:
        base.gradient_checkpointing_enable()
    config = hf_visual_peft.TCPConfig(init_text="photo", hidden=6, weight=2.0)
    model = randomised(get_peft_model(base, config)).train()
    equation = equation_of(model)
    assert model.peft_config["default"].block == 1
    output = model(**images(family), labels=LABELS)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in equation.named_parameters()}
    model.zero_grad()
    base.gradient_checkpointing_disable()
    image, text0 = features_of(base, family)
    first, _, second = equation.meta
    inner = F.normalize(text0, dim=-1) @ first.weight.T + first.bias
    own = ((inner * torch.sigmoid(1.702 * inner)) @ second.weight.T + second.bias).unflatten(-1, (5, 16))
    start = 1 if family == "clip" else 0
    slots = list(range(start, start + 5))
    text = text_by_hand(base, family, with_vectors(base, family, equation.vectors), {1: (slots, own)})
    expected = compare(family, image, text)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    loss = F.cross_entropy(expected, LABELS) + 2 * (1 - F.cosine_similarity(text, text0).mean())
    torch.testing.assert_close(output.loss, loss, atol=1e-4, rtol=1e-4)
    loss.backward()
    for name, parameter in equation.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_tcp_at_a_block_that_is_not_there(base):
    with pytest.raises(
        ValueError, match=r"TCPConfig.block is 2: must be an integer from 0 to 1 \(the text tower's last"
    ):
        get_peft_model(base, hf_visual_peft.TCPConfig(block=2))


def test_vectors_of_classes_go_with_their_names(base, folders, tmp_path):
    if base.encoder.config.model_type != "clip":
        pytest.skip("one family is enough")
    config = hf_visual_peft.CoOpConfig(num_virtual_tokens=2, class_specific=True)
    model = randomised(get_peft_model(base, config)).eval()
    trained = model(**images("clip")).logits
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path), class_names=["sea", "kite", "cat"])
    logits = again(**images("clip")).logits
    torch.testing.assert_close(logits[:, [0, 2]], trained[:, [3, 0]])
    vectors = equation_of(model).vectors.mean(0)
    text = text_by_hand(base, "clip", with_vectors(base, "clip", vectors, names=["kite"]))
    torch.testing.assert_close(
        logits[:, 1:2], compare("clip", features_of(base, "clip")[0], text), atol=1e-4, rtol=1e-4
    )
    model.base_model.model.set_class_names(["sea"])
    torch.testing.assert_close(model(**images("clip")).logits, trained[:, 3:])
    model.base_model.model.set_class_names(NAMES)
    torch.testing.assert_close(model(**images("clip")).logits, trained)


def test_shared_vectors_serve_names_they_were_not_trained_on(family, folders, tmp_path):
    model = get_peft_model(classifier(folders[family], NAMES[:2]), hf_visual_peft.CoOpConfig(num_virtual_tokens=3))
    randomised(model).save_pretrained(tmp_path)
    vectors, new = equation_of(model).vectors, ["kite", "old town", "dog"]
    with torch.no_grad():
        again = load_classifier(str(tmp_path), class_names=new)
        base = classifier(folders[family])
        text = text_by_hand(base, family, with_vectors(base, family, vectors, names=new))
        expected = compare(family, features_of(base, family)[0], text)
        torch.testing.assert_close(again(**images(family)).logits, expected, atol=1e-4, rtol=1e-4)


def support(family):
    """Batches of eight labelled images, three classes with two or three, one with one."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 3, 0])
    pixels = torch.randn(8, 3, 16, 16, generator=generator)
    return [{"pixel_values": pixels[i : i + 3], "labels": labels[i : i + 3]} for i in (0, 3, 6)]


def support_features(base, family):
    batches = support(family)
    images = torch.cat([base.encoder.get_image_features(b["pixel_values"]).pooler_output for b in batches])
    return F.normalize(images, dim=-1).detach(), torch.cat([b["labels"] for b in batches])


def prepared(base, family, config):
    """A model with an adapter that has seen what it must see."""
    model = get_peft_model(base, config)
    if isinstance(equation_of(model), SupportEquation):
        hf_visual_peft.fit(model, support(family))
    return model


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_prograd(base, family, ratio):
    config = hf_visual_peft.ProGradConfig(num_virtual_tokens=3, weight=ratio, temperature=2.0)
    model = randomised(get_peft_model(base, config))
    vectors = equation_of(model).vectors
    image, text0 = features_of(base, family)
    own = vectors.detach().clone().requires_grad_()
    logits = compare(family, image, text_by_hand(base, family, with_vectors(base, family, own)))
    target = (compare(family, image, text0) / 2).softmax(-1).detach()

    def gradient(loss):
        return torch.autograd.grad(loss, own, retain_graph=True)[0]

    h = gradient(-(target * (logits / 2).log_softmax(-1)).sum(-1).mean() * 4)
    single = [[gradient(-row[k]) for k in range(4)] for row in logits.log_softmax(-1)]
    products = torch.tensor([[(each * h).sum() for each in row] for row in single])
    for labels, opposed in ((products.argmin(-1), True), (products.argmax(-1), False)):
        vectors.grad = None
        output = model(**images(family), labels=labels)
        output.loss.backward()
        g = gradient(F.cross_entropy(logits, labels))
        assert ((g * h).sum() < 0) == opposed
        expected = g - ratio * (g * h).sum() / h.square().sum() * h if opposed else g
        torch.testing.assert_close(vectors.grad, expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels), atol=1e-4, rtol=1e-4)
    base.encoder.logit_scale.requires_grad_()
    with pytest.raises(ValueError, match="other parameters than its vectors and the scale train"):
        model(**images(family), labels=labels)


def test_cocoop(base, family):
    model = randomised(get_peft_model(base, hf_visual_peft.CoCoOpConfig(init_text="of", reduction=2)))
    equation = equation_of(model)
    output = model(**images(family), labels=LABELS)
    output.loss.backward()
    image, _ = features_of(base, family)
    first, _, second = equation.meta
    for index in range(3):
        shift = second.weight @ (first.weight @ F.normalize(image[index], dim=-1) + first.bias).relu() + second.bias
        text = text_by_hand(base, family, with_vectors(base, family, equation.vectors + shift))
        torch.testing.assert_close(
            output.logits[index], compare(family, image[index : index + 1], text)[0], atol=1e-4, rtol=1e-4
        )
    assert all(p.grad.abs().max() > 0 for p in equation.parameters())


@pytest.mark.parametrize("side", ["image", "text", "both"])
def test_clip_adapter(base, family, side):
    model = randomised(get_peft_model(base, hf_visual_peft.CLIPAdapterConfig(side=side, ratio=0.3)))
    equation = equation_of(model)
    features = dict(zip(("image", "text"), features_of(base, family), strict=True))
    for name in ("image", "text") if side == "both" else (side,):
        part, f = getattr(equation, name), features[name]
        assert part.down.out_features == f.shape[-1] // 4
        features[name] = 0.3 * (part.up.weight @ (part.down.weight @ f.T).relu()).relu().T + 0.7 * f
    expected = compare(family, features["image"], features["text"])
    torch.testing.assert_close(model(**images(family)).logits, expected, atol=1e-4, rtol=1e-4)


def test_taskres(base, family):
    model = randomised(get_peft_model(base, hf_visual_peft.TaskResConfig(scale=0.7)))
    image, text = features_of(base, family)
    expected = compare(family, image, text + 0.7 * equation_of(model).residual)
    torch.testing.assert_close(model(**images(family)).logits, expected, atol=1e-4, rtol=1e-4)


def test_cross_modal(base, family):
    model = randomised(get_peft_model(base, hf_visual_peft.CrossModalConfig()))
    image, text = (F.normalize(each, dim=-1) for each in features_of(base, family))
    scale, weight = torch.tensor(SCALE[family]).exp(), equation_of(model).weight
    output = model(**images(family), labels=LABELS)
    torch.testing.assert_close(output.logits, scale * image @ weight.T, atol=1e-4, rtol=1e-4)
    loss = F.cross_entropy(scale * image @ weight.T, LABELS) + F.cross_entropy(
        scale * text @ weight.T, torch.arange(4)
    )
    torch.testing.assert_close(output.loss, loss / 2, atol=1e-4, rtol=1e-4)


def test_clap(base, family):
    image, text = features_of(base, family)
    model = prepared(base, family, hf_visual_peft.CLAPConfig())
    torch.testing.assert_close(model(**images(family)).logits, compare(family, image, text), atol=1e-4, rtol=1e-4)
    randomised(model)
    weight = equation_of(model).weight
    keys, labels = support_features(base, family)
    probability = compare(family, keys, text).softmax(-1)
    c = torch.stack([probability[labels == k, k].mean() for k in range(4)])
    output = model(**images(family), labels=LABELS)
    loss = F.cross_entropy(compare(family, image, weight), LABELS) + (c * (weight - text).square().sum(-1)).mean()
    torch.testing.assert_close(output.loss, loss, atol=1e-4, rtol=1e-4)


def test_zero_shot_linear_probe_needs_no_images(base, family):
    model = get_peft_model(base, hf_visual_peft.CLAPConfig(constrained=False))
    output = model(**images(family), labels=LABELS)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, LABELS))


@pytest.mark.parametrize("trains", [False, True])
def test_tip_adapter(base, family, trains):
    config = hf_visual_peft.TipAdapterConfig(alpha=2.0, beta=3.0, train_keys=trains)
    model = prepared(base, family, config)
    image, text = features_of(base, family)
    keys, labels = support_features(base, family)
    torch.testing.assert_close(equation_of(model).keys.detach(), keys, atol=1e-5, rtol=1e-4)
    if trains:
        keys = keys + 0.1
        equation_of(model).keys.data.add_(0.1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == (keys.numel() if trains else 0)
    scale = torch.tensor(SCALE[family]).exp()
    memory = torch.exp(-3 * (1 - F.normalize(image, dim=-1) @ keys.T)) @ torch.eye(4)[labels]
    expected = compare(family, image, text) + 2 * scale / 100 * memory
    torch.testing.assert_close(model(**images(family)).logits, expected, atol=1e-4, rtol=1e-4)


def test_tip_adapter_chooses_on_images_that_are_left_out(base, family):
    model = prepared(base, family, hf_visual_peft.TipAdapterConfig())
    _, text = features_of(base, family)
    keys, labels = support_features(base, family)
    scale, losses = torch.tensor(SCALE[family]).exp(), {}
    for alpha in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
        for beta in (0.5, 1.0, 2.0, 4.0, 7.0):
            rows = []
            for index in range(8):
                rest = [other for other in range(8) if other != index]
                memory = torch.exp(-beta * (1 - keys[index] @ keys[rest].T)) @ torch.eye(4)[labels[rest]]
                rows.append(compare(family, keys[index][None], text)[0] + alpha * scale / 100 * memory)
            losses[alpha, beta] = F.cross_entropy(torch.stack(rows), labels).item()
    assert tuple(equation_of(model).strength.tolist()) == pytest.approx(min(losses, key=losses.get))


def test_tip_adapter_with_one_image_a_class(base, family):
    model = get_peft_model(base, hf_visual_peft.TipAdapterConfig())
    (batch, *_) = support(family)
    hf_visual_peft.fit(model, [batch])
    assert equation_of(model).strength.tolist() == pytest.approx([1.17, 1.0])


def test_proker(base, family):
    model = prepared(base, family, hf_visual_peft.ProKeRConfig(beta=2.0, lam=0.3))
    image, text = (F.normalize(each, dim=-1) for each in features_of(base, family))
    keys, labels = support_features(base, family)
    kernel = torch.exp(-2 * (1 - keys @ keys.T)) + 0.3 * torch.eye(8)
    dual = torch.linalg.inv(kernel) @ (torch.eye(4)[labels] - keys @ text.T)
    correction = torch.exp(-2 * (1 - image @ keys.T)) @ dual
    expected = compare(family, image, text) + torch.tensor(SCALE[family]).exp() * correction
    torch.testing.assert_close(model(**images(family)).logits, expected, atol=1e-3, rtol=1e-3)


def test_proker_without_regularisation_gives_the_labels(base, family):
    model = prepared(base, family, hf_visual_peft.ProKeRConfig(beta=50.0, lam=1e-6))
    scale, bias = torch.tensor(SCALE[family]).exp(), BIAS[family]
    logits = torch.cat([model(b["pixel_values"]).logits for b in support(family)])
    labels = torch.cat([b["labels"] for b in support(family)])
    torch.testing.assert_close((logits - bias) / scale, torch.eye(4)[labels], atol=1e-2, rtol=0)


def test_lp_plus_plus(base, family):
    model = prepared(base, family, hf_visual_peft.LPPlusPlusConfig(steps=12))
    image, text = (F.normalize(each, dim=-1).detach() for each in features_of(base, family))
    x, labels = support_features(base, family)
    own = torch.eye(4)[labels]
    w, b = own.T @ x, torch.zeros(4)
    a = torch.full((4,), 250 * (x * text[labels]).sum(-1).mean().item())
    rate = 4 * 8 / torch.linalg.svdvals(x)[0] ** 2
    rate_a = 8 / (4 * (x @ text.T).square().sum(0).max())
    vw, vb, va = torch.zeros_like(w), torch.zeros_like(b), torch.zeros_like(a)
    for step in range(12):
        error = (x @ w.T + b + a * (x @ text.T)).softmax(-1) - own
        gw, gb, ga = error.T @ x / 8, error.mean(0), (error * (x @ text.T)).mean(0)
        vw, vb = 0.9 * vw + gw, 0.9 * vb + gb
        w, b = w - rate * vw, b - rate * vb
        if step % 10 == 0:
            va = 0.9 * va + ga
            a = a - rate_a * va
    expected = image @ w.T + b + a * (image @ text.T)
    torch.testing.assert_close(model(**images(family)).logits, expected, atol=2e-3, rtol=1e-3)


def test_lp_plus_plus_descends(base, family):
    losses = []
    for steps in (0, 5, 20, 60):
        base.adapters = base.adapters.base_layer if steps else base.adapters
        vars(base).pop("peft_config", None)
        model = prepared(base, family, hf_visual_peft.LPPlusPlusConfig(steps=steps, momentum=0.0))
        losses.append(sum(model(**batch).loss.item() * len(batch["labels"]) for batch in support(family)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_lp_plus_plus_starts_as_the_zero_shot_classifier(base, family):
    expected = base(**images(family)).logits.softmax(-1)
    model = get_peft_model(base, hf_visual_peft.LPPlusPlusConfig())
    torch.testing.assert_close(model(**images(family)).logits.softmax(-1), expected, atol=1e-5, rtol=1e-4)


def test_fit_says_what_is_wrong(base, family):
    batches = support(family)
    with pytest.raises(ValueError, match="ZeroShotClassifier takes no images in this way"):
        hf_visual_peft.fit(base, batches)
    model = get_peft_model(base, hf_visual_peft.ProKeRConfig())
    with pytest.raises(ValueError, match="has seen no images yet"):
        model(**images(family))
    with pytest.raises(ValueError, match="no batch"):
        hf_visual_peft.fit(model, [])
    with pytest.raises(ValueError, match="indices from 0 to 3"):
        hf_visual_peft.fit(model, [{**batches[0], "labels": torch.tensor([0, 1, 4])}])
    base.set_class_names(["sea", "cat"])
    with pytest.raises(ValueError, match=r"has the classes \['sea', 'cat'\], and the adapter \['cat'"):
        hf_visual_peft.fit(model, batches)
    assert equation_of(model).support is None
    other = get_peft_model(base.train(False), hf_visual_peft.ProKeRConfig(), "other")
    assert other.peft_config["other"].support_size is None


WITH_ROWS = ["clap", "coop", "cross_modal", "lp_plus_plus", "proker", "taskres", "tip_adapter"]


@pytest.mark.parametrize("name", WITH_ROWS)
def test_classes_go_with_their_names(base, folders, family, tmp_path, name):
    """Known classes keep their logits under other names, and new ones have those of their texts."""
    config = hf_visual_peft.list_language_methods()[name].config_cls()
    if name == "coop":
        config.class_specific = True
    model = prepared(base, family, config)
    if name != "lp_plus_plus":
        randomised(model)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(**images(family)).logits
        again = load_classifier(str(tmp_path), class_names=["sea", "kite", "cat"])
        logits = again(**images(family)).logits
        torch.testing.assert_close(logits[:, [0, 2]], trained[:, [3, 0]], atol=1e-4, rtol=1e-4)
        zero_shot = classifier(folders[family], ["kite"])(**images(family)).logits
        if name == "lp_plus_plus" or (name == "cross_modal"):
            zero_shot = zero_shot - BIAS[family]
        if name != "coop":
            torch.testing.assert_close(logits[:, 1:2], zero_shot, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def b16():
    """CLIP ViT-B/16 without weights."""
    with torch.device("meta"):
        encoder = CLIPModel(CLIPConfig(text_config={"eos_token_id": 49407}, vision_config={"patch_size": 16}))
    return encoder


@pytest.mark.parametrize(
    ("name", "fields", "classes", "count"),
    [(name, *each) for name, method in hf_visual_peft.list_language_methods().items() for each in method.counts],
)
def test_counts(b16, name, fields, classes, count):
    config = hf_visual_peft.ZeroShotConfig(b16.config, [f"class {index}" for index in range(classes)])
    model = ZeroShotClassifier(config, copy.deepcopy(b16), clip_tokenizer())
    model = get_peft_model(model, hf_visual_peft.list_language_methods()[name].config_cls(**fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_clip_lora(b16):
    config = hf_visual_peft.ZeroShotConfig(b16.config, ["cat"])
    model = get_peft_model(
        ZeroShotClassifier(config, copy.deepcopy(b16), clip_tokenizer()), hf_visual_peft.clip_lora()
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 184_320
    layer = model.base_model.model.encoder.text_model.encoder.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(0.5**0.5)


METHODS = list(hf_visual_peft.list_language_methods())


@pytest.mark.parametrize("name", METHODS)
def test_trains_saves_and_loads(base, family, folders, tmp_path, name):
    if (name, family) == ("plot", "siglip"):
        pytest.skip("its patches have no features")
    config = hf_visual_peft.list_language_methods()[name].config_cls()
    zero_shot = base.eval()(**images(family)).logits
    model = prepared(base, family, config)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trains, 0.1) if trains else None
    model.train()
    for _ in range(2 if trains else 0):
        optimizer.zero_grad()
        model(**images(family), labels=LABELS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert not any(
        n.startswith("base_model.model.encoder.") for n, p in model.named_parameters() if p.grad is not None
    )
    model.eval()
    with torch.no_grad():
        trained = model(**images(family)).logits
        torch.testing.assert_close(model(**images(family)).logits, trained, atol=0, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(model(**images(family)).logits, zero_shot)
    assert not torch.allclose(trained, zero_shot, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(again(**images(family)).logits, trained)
        again.base_model.model.set_class_names(NAMES[::-1])
        torch.testing.assert_close(again(**images(family)).logits, trained.flip(1))
    if name not in LINEAR:
        with pytest.raises(ValueError, match="cannot be merged: "):
            again.merge_and_unload()
    torch.testing.assert_close(model.unload()(**images(family)).logits, zero_shot)


def test_several_adapters(base, family, tmp_path):
    model = get_peft_model(base, hf_visual_peft.CoOpConfig(num_virtual_tokens=2), "one")
    model.add_adapter("two", hf_visual_peft.CoOpConfig(num_virtual_tokens=3))
    first = model.eval()(**images(family)).logits
    model.set_adapter("two")
    second = model(**images(family)).logits
    assert not torch.allclose(first, second)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.adapters.coop_equation.two.vectors"
    ]
    with pytest.raises(ValueError, match="do not mix adapters in a batch"):
        model(**images(family), adapter_names=["one", "two", "one"])
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="their logits do not add"):
        model(**images(family))
    model.set_adapter("two")
    model.delete_adapter("two")
    model.set_adapter("one")
    torch.testing.assert_close(model(**images(family)).logits, first)


def test_what_does_not_fit_leaves_the_model_as_it_was(base, family, folders):
    modules = dict(base.named_modules())
    config = hf_visual_peft.CoOpConfig(num_virtual_tokens=40)
    with pytest.raises(ValueError, match=r"Class 'cat': its text has 4[0-9] tokens"):
        get_peft_model(base, config)
    assert dict(base.named_modules()) == modules
    assert all(p.requires_grad for p in base.encoder.parameters())
    assert config.class_names is None
    model = get_peft_model(base, hf_visual_peft.CoOpConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"Class 'catcatcat.*tokens"):
        base.set_class_names(["catcatcat" * 4])
    assert base.class_names == NAMES
    with pytest.raises(ValueError, match="KgCoOpConfig cannot act beside 'coop'"):
        get_peft_model(base, hf_visual_peft.KgCoOpConfig())
    model(**images(family))
    with pytest.raises(ValueError, match="adapts a ZeroShotClassifier, and the model is a"):
        get_peft_model(classifier(folders[family]).encoder, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"init_text": " "}, "init_text is ' '"),
        ({"position": "back"}, "one of 'front', 'middle', 'end'"),
        ({"class_names": ["a", "a"]}, "tell these classes apart"),
        ({"templates": "x"}, "one {}"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        hf_visual_peft.CoOpConfig(**fields)


def test_number_of_words_and_vectors(base):
    with pytest.raises(ValueError, match="num_virtual_tokens is 4: must be None or 9"):
        get_peft_model(base, hf_visual_peft.CoOpConfig(num_virtual_tokens=4, init_text="a photo of a"))


def test_one_config_serves_several_classifiers(base, folders, family):
    config = hf_visual_peft.CoOpConfig(num_virtual_tokens=2, class_specific=True)
    get_peft_model(base, config)
    other = get_peft_model(classifier(folders[family], ["kite", "sea"]), config)
    assert other.peft_config["default"].class_names == ["kite", "sea"]
    assert equation_of(other).names == ["kite", "sea"]
    assert isinstance(other, PeftModel)


def test_two_processes_have_the_gradients_of_one(folders, tmp_path):
    """With some of the classes at a time, computed again in the backward pass, and without unused parameters."""
    script = Path(language_gradients.__file__)
    words = [sys.executable, str(script), folders["clip"], str(tmp_path), str(tmp_path / "address")]
    runs = [subprocess.Popen([*words, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    for each in runs:
        _, errors = each.communicate(timeout=240)
        assert each.returncode == 0, errors
    for name in language_gradients.CONFIGS:
        alone = language_gradients.gradients(folders["clip"], name, slice(None), wrap=False)
        together = load_file(tmp_path / f"{name}.safetensors")
        assert set(together) == set(alone)
        for key, gradient in alone.items():
            torch.testing.assert_close(together[key], gradient, atol=2e-5, rtol=2e-4, msg=f"{name}: {key}")


# ------------------------------------------------------------------------------------------------------------- merging

LINEAR = {
    "taskres": hf_visual_peft.TaskResConfig,
    "clap": hf_visual_peft.CLAPConfig,
    "lp_plus_plus": hf_visual_peft.LPPlusPlusConfig,
    "cross_modal": hf_visual_peft.CrossModalConfig,
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_heads_merge_into_weights_of_classes(folders, family, tmp_path, name):
    """The merged classifier decides as the adapter, under new names too, and without the text tower under its own."""
    base = classifier(folders[family], templates=["a photo of a {}.", "{}"])
    model = get_peft_model(base, LINEAR[name]())
    randomised(model)
    model.eval()
    inputs = images(family)
    names = ["sea", "kite", "cat"]
    with torch.no_grad():
        with model.disable_adapter():
            before = model(**inputs).logits
        expected = model(**inputs).logits
        base.set_class_names(names)
        expected_new = model(**inputs).logits
        base.set_class_names(NAMES)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-5)
        model.unmerge_adapter()
        assert base.config.stored_classes is None
        assert torch.equal(model(**inputs).logits, expected)
        model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(**inputs).logits, before)
        merged = model.merge_and_unload()
        assert merged is base
        assert len(merged.adapters.state_dict()) == 2
        merged.save_pretrained(tmp_path)
        for each in (merged, ZeroShotClassifier.from_pretrained(str(tmp_path))):
            runs = []
            each.train()  # forgets features of the classes
            each.eval().encoder.text_model.register_forward_hook(lambda *_, runs=runs: runs.append(1))
            output = each(**inputs, labels=torch.tensor([0, 1, 2]))
            assert not runs
            torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(output.loss, F.cross_entropy(expected, torch.tensor([0, 1, 2])))
            each.set_class_names(names)
            torch.testing.assert_close(each(**inputs).logits, expected_new, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="CoOpConfig: the classes have weights of their own"):
        get_peft_model(merged, hf_visual_peft.CoOpConfig(num_virtual_tokens=2))


def test_what_is_no_linear_does_not_merge(base, family):
    for config, message in (
        (hf_visual_peft.CoOpConfig(num_virtual_tokens=2), "learned vectors stand among the words"),
        (hf_visual_peft.CLIPAdapterConfig(), "a bottleneck with ReLUs"),
        (hf_visual_peft.ProKeRConfig(), "its logits are no linear function"),
    ):
        model = get_peft_model(base, config)
        before = dict(base.named_modules())
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=f"cannot be merged: {message}"):
                merge()
        assert dict(base.named_modules()) == before
        base = model.unload()
    model = get_peft_model(base, hf_visual_peft.TaskResConfig())
    base.adapters.equations["default"].residual.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not base.adapters.merged


@torch.no_grad()
@pytest.mark.parametrize("unloaded", [False, True])
def test_clip_lora_merges_in_both_towers(base, family, unloaded):
    model = get_peft_model(base, hf_visual_peft.clip_lora(init_lora_weights=False)).eval()
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert {"text_model" in name for name in adapted} == {True, False}
    inputs = images(family)
    expected, text = model(**inputs).logits, model(**inputs).text_embeds
    if unloaded:
        model = model.merge_and_unload()
        assert not any("lora" in name for name, _ in model.named_modules())
    else:
        model.merge_adapter()
    assert base._features["templates False"][1].data_ptr()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(model(**inputs).text_embeds, text, atol=1e-5, rtol=1e-4)
    if not unloaded:
        model.unmerge_adapter()
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-3, rtol=1e-4)
        with model.disable_adapter():
            assert not torch.allclose(model(**inputs).text_embeds, text, atol=1e-3)
