"""A dual encoder as a classifier equals the dual encoder, before and after everything a user does with it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from dual_encoders import FAMILIES, NAMES, assert_learns_from_cache, classifier, images
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPImageProcessor,
    ViTConfig,
    pipeline,
)

import hf_visual_peft
from hf_visual_peft import ZeroShotClassifier, load_classifier
from hf_visual_peft.language.towers import Towers


TEXTS = ["a photo of a cat.", "a photo of a big dog.", "a photo of a apple pie.", "a photo of a sea."]


@torch.no_grad()
def reference(folder, family, texts=TEXTS):
    """The logits that the dual encoder itself computes, with its texts padded as it was trained."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    full = {"padding": "max_length", "max_length": Towers(model).max_length}
    tokens = tokenizer(texts, return_tensors="pt", **(full if family != "dual" else {"padding": True}))
    if family.startswith("siglip"):
        tokens.pop("attention_mask")
    tokens.pop("token_type_ids", None)
    return model(**tokens, **images(family)).logits_per_image


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dual_encoder(folders, family):
    model = classifier(folders[family])
    labels = torch.tensor([0, 3, 2])
    with torch.no_grad():
        output = model(**images(family), labels=labels)
    expected = reference(folders[family], family)
    assert expected.std() > 0.05
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, labels), atol=1e-4, rtol=1e-5)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert output.image_embeds.norm(dim=-1).allclose(torch.ones(3))
    assert all(p.requires_grad for p in model.encoder.parameters())


def test_old_checkpoints_pool_at_the_end_of_the_text(folders):
    """There the end token of the config is not that of the tokenizer, and the largest id counts."""
    assert Towers(classifier(folders["clip_of_2021"]).encoder).end_token is None
    assert Towers(classifier(folders["clip"]).encoder).end_token == 30


def test_texts_are_trimmed_only_where_that_is_exact(folders):
    model = classifier(folders["clip"])
    assert model._tokens.ids.shape == (4, 20)
    assert classifier(folders["siglip"])._tokens.ids.shape == (4, 40)
    assert classifier(folders["siglip"])._tokens.mask is None
    assert classifier(folders["align"])._tokens.mask.sum(1).tolist() == [15, 18, 20, 15]


@pytest.mark.parametrize("before", [True, False])
def test_several_templates(folders, before):
    templates = ["a photo of a {}.", "{}", "art of the {}!"]
    model = classifier(folders["clip"], templates=templates, normalize_before_mean=before)
    encoder, tokenizer = AutoModel.from_pretrained(folders["clip"]), AutoTokenizer.from_pretrained(folders["clip"])
    features = []
    for template in templates:
        texts = [template.format(name.replace("_", " ")) for name in NAMES]
        features.append(encoder.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output)
    if before:
        features = [F.normalize(each, dim=-1) for each in features]
    expected = F.normalize(torch.stack(features).mean(0), dim=-1)
    torch.testing.assert_close(model(**images("clip")).text_embeds, expected)


def test_templates_by_name(folders):
    model = classifier(folders["clip"], ["cat", "sea"], templates="simple")
    assert len(model.config.templates) == 7
    assert model.config.templates[0] == "itap of a {}."
    assert model.class_features().shape == (2, 12)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("a photo", r"must be a text with one \{\}"),
        (["{} and {}"], r"one \{\}"),
        ([], "a text, a list of texts"),
        (["{}", "{}"], "twice"),
        ([3], "must be a text"),
    ],
)
def test_wrong_templates(folders, templates, message):
    model = classifier(folders["clip"])
    with pytest.raises(ValueError, match=message):
        model.set_class_names(["cat"], templates)
    assert model.class_names == NAMES


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one"),
        ("cat", "must be a list"),
        (["cat", ""], r"class_names\[1\] is ''"),
        (["cat", " _ "], r"class_names\[1\] is ' _ '"),
        (["cat", 3], r"class_names\[1\] is 3"),
        (["big dog", "cat", "big_dog"], r"class_names\[2\] is 'big_dog', and 'big dog' stands before it"),
        (["cat", "word " * 9], r"Class 'word word .*48 tokens, 8 more than the 40 positions of CLIPTextModel"),
    ],
)
def test_wrong_names(folders, names, message):
    model = classifier(folders["clip"])
    before = model(**images("clip")).logits
    with pytest.raises(ValueError, match=message):
        model.set_class_names(names)
    assert model.class_names == NAMES
    assert torch.equal(model(**images("clip")).logits, before)


def test_long_names_fit_if_they_fit(folders):
    name = " ".join(["word"] * 30)
    model = classifier(folders["clip_of_2021"], [name, "cat"])
    torch.testing.assert_close(
        model(**images("clip")).logits,
        reference(folders["clip_of_2021"], "clip", [f"a photo of a {name}.", TEXTS[0]]),
        atol=1e-4,
        rtol=1e-5,
    )


def test_no_names_are_asked_for(folders):
    with pytest.raises(ValueError, match="class_names"):
        ZeroShotClassifier.from_pretrained(folders["clip"])


def test_other_models_are_refused(tmp_path):
    config = hf_visual_peft.ZeroShotConfig(class_names=["cat"])
    vit = AutoModelForImageClassification.from_config(ViTConfig(num_hidden_layers=1, hidden_size=12))
    with pytest.raises(ValueError, match="ViTForImageClassification is not a dual encoder"):
        ZeroShotClassifier(config, vit)


def test_new_names_at_any_time(folders):
    model = classifier(folders["clip"], ["sea", "cat"])
    model(**images("clip"))
    model.set_class_names(NAMES)
    torch.testing.assert_close(
        model(**images("clip")).logits, reference(folders["clip"], "clip"), atol=1e-4, rtol=1e-5
    )
    assert model.config.label2id["sea"] == 3


def test_texts_are_encoded_once_until_something_changes(folders):
    model = classifier(folders["clip"]).requires_grad_(False)
    calls = []
    model.encoder.text_model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        first = model(**images("clip")).logits
    assert len(calls) == 1
    with torch.inference_mode():
        model(**images("clip"))
    with torch.no_grad():
        model.encoder.text_projection.weight.mul_(-1)
    assert not torch.allclose(model(**images("clip")).logits, first)
    assert len(calls) == 2
    model.double()
    second = model(pixel_values=images("clip")["pixel_values"].double()).logits
    assert second.dtype == torch.float64
    assert len(calls) == 3


def test_a_text_tower_that_trains_is_encoded_each_time(folders):
    model = classifier(folders["clip"])
    with torch.inference_mode():
        model(**images("clip"))  # keeps what it computed
    model(**images("clip"), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.encoder.text_model.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_frozen_text_tower_has_no_dropout(folders):
    model = classifier(folders["dual"])
    model.encoder.text_model.requires_grad_(False)
    model.encoder.text_projection.requires_grad_(False)
    expected = model.eval()(**images("dual")).text_embeds
    assert model.encoder.text_model.config.hidden_dropout_prob > 0
    torch.testing.assert_close(model.train()(**images("dual")).text_embeds, expected)
    assert model.encoder.text_model.training


def test_chunks_of_classes_change_nothing(folders):
    gradients = []
    for chunk in (256, 3):
        model = classifier(folders["clip"], class_chunk=chunk)
        model(**images("clip"), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_several_labels_an_image(folders):
    model = classifier(folders["siglip"])
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    output = model(**images("siglip"), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


def test_saved_as_a_whole(folders, tmp_path):
    model = classifier(folders["clip"], templates=["a {}.", "the {}."], normalize_before_mean=False)
    model.save_pretrained(tmp_path)
    expected = model(**images("clip")).logits
    for load in (ZeroShotClassifier.from_pretrained, load_classifier):
        again = load(str(tmp_path))
        assert again.class_names == NAMES
        assert again.config.templates == ["a {}.", "the {}."]
        torch.testing.assert_close(again(**images("clip")).logits, expected)
    other = ZeroShotClassifier.from_pretrained(str(tmp_path), class_names=["sea"])
    torch.testing.assert_close(other(**images("clip")).logits[:, 0], expected[:, 3])


@pytest.mark.parametrize(
    "config",
    [
        hf_visual_peft.VPTConfig(num_virtual_tokens=2),
        hf_visual_peft.SSFConfig(),
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ],
    ids=["vpt", "ssf", "lora"],
)
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_methods_for_images_and_of_peft(folders, tmp_path, family, config):
    base = classifier(folders[family], templates="art of a {}.")
    before = base(**images(family)).logits
    model = peft.get_peft_model(base, copy.deepcopy(config))
    assert not any("text" in n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**images(family), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    model.eval()
    trained = model(**images(family)).logits
    assert not torch.allclose(trained, before, atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(model(**images(family)).logits, before)
    torch.testing.assert_close(model(**images(family)).logits, trained)
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path))
    assert again.base_model.model.class_names == NAMES
    assert again.base_model.model.config.templates == ["art of a {}."]
    torch.testing.assert_close(again(**images(family)).logits, trained)
    assert not any(p.requires_grad for p in again.parameters())
    others = load_classifier(str(tmp_path), class_names=["sea", "kite"])
    torch.testing.assert_close(others(**images(family)).logits[:, 0], trained[:, 3])


def test_an_adapter_without_names_says_what_is_missing(folders, tmp_path):
    model = peft.get_peft_model(AutoModel.from_pretrained(folders["clip"]), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no class names"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("name", ["CoOpConfig", "CoCoOpConfig", "KgCoOpConfig", "TaskResConfig", "CLIPAdapterConfig"])
def test_features_of_images_are_computed_once(folders, tmp_path, family, name):
    fields = {"num_virtual_tokens": 2} if name == "CoOpConfig" else {}
    model = peft.get_peft_model(classifier(folders[family]), getattr(hf_visual_peft, name)(**fields))
    assert len(assert_learns_from_cache(model, family, tmp_path)) > 1


def test_half_precision_and_checkpointing(folders):
    gradients = []
    folder = folders["clip"]  # before the seed: it is made when it is first asked for, with random weights
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = classifier(folder, dtype=torch.bfloat16)
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = peft.get_peft_model(base, hf_visual_peft.CoOpConfig(num_virtual_tokens=2)).train()
        pixels = images("clip")["pixel_values"].bfloat16()
        output = model(pixel_values=pixels, labels=torch.tensor([0, 1, 2]))
        assert output.logits.dtype == torch.float32
        output.loss.backward()
        (vectors,) = (p for p in model.parameters() if p.requires_grad)
        assert vectors.dtype == torch.float32
        gradients.append(vectors.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(folders["clip"])(**images("clip")).logits.dtype == torch.float32


def test_pipeline(folders):
    model = classifier(folders["clip"])
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    picture = Image.new("RGB", (20, 20), "red")
    found = pipeline("image-classification", model=model, image_processor=processor)(picture, top_k=4)
    logits = model(**processor(picture, return_tensors="pt")).logits
    assert {each["label"]: each["score"] for each in found} == pytest.approx(
        dict(zip(NAMES, logits.softmax(-1)[0].tolist(), strict=True)), abs=1e-5
    )


def test_retrieval(folders):
    model = classifier(folders["clip"])
    texts = model.encode_texts(TEXTS)
    pictures = model.encode_images(**images("clip", 3))
    torch.testing.assert_close(pictures @ texts.T * model.encoder.logit_scale.exp(), model(**images("clip")).logits)
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.3, 0.2], [0.1, 0.2, 0.7]])
    found = hf_visual_peft.recall_at_k(similarity, ks=(1, 2))
    assert found == pytest.approx(
        {
            "image_to_text_recall@1": 2 / 3,
            "image_to_text_recall@2": 1.0,
            "text_to_image_recall@1": 2 / 3,
            "text_to_image_recall@2": 1.0,
        }
    )
    pairs = torch.tensor([[True, True, False, False], [False, False, True, True]])
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.5, 0.4, 0.3, 0.1]])
    assert hf_visual_peft.recall_at_k(scores, pairs, ks=(1,)) == {
        "image_to_text_recall@1": 0.5,
        "text_to_image_recall@1": 0.75,
    }
    for texts in ("a cat", []):
        with pytest.raises(ValueError, match="must be a list of texts, at least one"):
            model.encode_texts(texts)
    with pytest.raises(ValueError, match="`pairs` must tell"):
        hf_visual_peft.recall_at_k(scores)
    with pytest.raises(ValueError, match="from 1 to 3"):
        hf_visual_peft.recall_at_k(similarity, ks=(4,))


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "siglip", "siglip2", "chinese_clip", "altclip", "dual"])
def test_vectors_of_the_words_are_the_words(folders, family):
    """On every kind of text tower; a class name has the tokens that it has after words."""
    base = classifier(folders[family], templates="abcd {}.").eval()
    zero_shot = base(**images(family)).logits
    model = peft.get_peft_model(base, hf_visual_peft.CoOpConfig(init_text="abcd")).eval()
    torch.testing.assert_close(model(**images(family)).logits, zero_shot, atol=1e-5, rtol=1e-6)


def test_classes_have_the_order_of_their_numbers(folders, tmp_path):
    model = classifier(folders["clip"])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.id2label = dict(sorted(config.id2label.items(), reverse=True))
    again = ZeroShotClassifier.from_pretrained(str(tmp_path), config=config)
    assert again.class_names == NAMES
    torch.testing.assert_close(again(**images("clip")).logits, model(**images("clip")).logits)
