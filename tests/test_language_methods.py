"""Each method for class texts equals its equation, written in plain torch from its paper, on CLIP and on SigLIP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dual_encoders import NAMES, classifier, images, saved
from peft import PeftModel, get_peft_model

import hf_visual_peft
from hf_visual_peft import load_classifier


LABELS = torch.tensor([0, 3, 2])
SCALE = {"clip": 2.6592, "siglip": 2.0}
BIAS = {"clip": 0.0, "siglip": -3.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: saved(family, tmp_path_factory.mktemp(family)) for family in ("clip", "siglip")}


@pytest.fixture(params=["clip", "siglip"])
def family(request):
    return request.param


@pytest.fixture
def base(folders, family):
    return classifier(folders[family])


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


def small(config_cls):
    """A config whose numbers suit tiny models."""
    return config_cls()


METHODS = list(hf_visual_peft.list_language_methods())


@pytest.mark.parametrize("name", METHODS)
def test_trains_saves_and_loads(base, family, folders, tmp_path, name):
    config = small(hf_visual_peft.list_language_methods()[name].config_cls)
    zero_shot = base.eval()(**images(family)).logits
    model = get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**images(family), labels=LABELS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    assert not any("encoder" in n for n, p in model.named_parameters() if p.grad is not None)
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
    with pytest.raises(ValueError, match="do not merge"):
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
    assert all(p.requires_grad for p in base.parameters())
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
