"""Methods in the text tower of a dual encoder, alone and beside the vision tower."""

from __future__ import annotations

import copy
import dataclasses
import functools

import peft
import pytest
import torch
import torch.nn.functional as F
from dual_encoders import FAMILIES, NAMES, assert_learns_from_cache, classifier, images
from torch import nn
from transformers import AutoModel, ViTConfig, ViTModel

import hf_visual_peft
from hf_visual_peft import BackboneError, find_backbone, get_method, list_methods, load_classifier
from hf_visual_peft.backbones.backbone import LINEAR_ROLES
from hf_visual_peft.coverage.sizes import small_config


SMALL = [family for family in FAMILIES if family != "clip_of_2021"]  # with small tokenizers
LABELS = torch.tensor([0, 3, 2])
# what acts on each token by itself, or on a weight
FITTING = [
    "adapterbias",
    "adapterplus",
    "adaptformer",
    "apla",
    "arc",
    "bapat",
    "biadaptformer",
    "bilora",
    "bitfit",
    "cara",
    "compacter",
    "consolidator",
    "cvpt",
    "difffit",
    "efft",
    "fact",
    "houlsby",
    "hydra",
    "kadaptation",
    "kradapter",
    "laeadapter",
    "laelora",
    "lorand",
    "mlae",
    "mosa",
    "partial",
    "patt",
    "pfeiffer",
    "repadapter",
    "rlrr",
    "samparser",
    "sharedlora",
    "snell",
    "snf",
    "ssf",
]


@pytest.fixture(scope="module")
def bases(folders):
    """Each family's classifier, loaded once and copied for each test."""
    loaded = functools.cache(lambda family: classifier(folders[family]))
    return lambda family: copy.deepcopy(loaded(family))


def adapted(base, name, tower="text", **fields):
    torch.manual_seed(0)
    return peft.get_peft_model(base, small_config(get_method(name), tower=tower, **fields)).eval()


def in_towers(model):
    """Numbers of trained tensors in the text tower and elsewhere."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    inside = [name for name in names if "encoder.text_model." in name]
    return len(inside), len(names) - len(inside)


@pytest.mark.parametrize("family", SMALL)
def test_the_blocks_of_every_text_tower_are_found(bases, family):
    base = bases(family)
    found = find_backbone(base, tower="text")
    assert found.path == "encoder.text_model"
    assert (found.depth, found.width, found.num_heads, found.prefix_tokens) == (2, 16, 2, 0)
    assert not found.heads
    assert not found.patch_embedding
    assert found.architecture.grid is None
    linears = {n for n, m in base.encoder.text_model.named_modules() if isinstance(m, nn.Linear) and ".0." in n}
    assert {f"encoder.text_model.{name}" for name in linears} == set(found.blocks[0].modules(LINEAR_ROLES))
    assert found.blocks[0].post_norm == (family in ("chinese_clip", "altclip", "align", "dual"))
    assert find_backbone(base).path == "encoder.vision_model"


@pytest.mark.parametrize("name", ["adaptformer", "ssf"])
@pytest.mark.parametrize("family", SMALL)
def test_text_towers_train_save_load_and_switch(bases, folders, tmp_path, family, name):
    base = bases(family)
    before = base(**images(family)).logits
    image = base(**images(family)).image_embeds
    model = adapted(base, name)
    assert in_towers(model)[1] == 0
    model(**images(family), labels=LABELS).loss.backward()
    gradients = {name: p.grad.abs().max() for name, p in model.named_parameters() if p.requires_grad}
    for block in range(2):
        assert max(value for name, value in gradients.items() if f".{block}." in name) > 0
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    output = model(**images(family))
    assert not torch.allclose(output.logits, before, atol=1e-3)
    torch.testing.assert_close(output.image_embeds, image)
    with model.disable_adapter():
        torch.testing.assert_close(model(**images(family)).logits, before)
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path), base=folders[family])
    assert again.peft_config["default"].tower == "text"
    torch.testing.assert_close(again(**images(family)).logits, output.logits)
    torch.testing.assert_close(model.unload()(**images(family)).logits, before)


REFUSED = r"does not fit CLIPTextModel|no fixed number of tokens|no task head"


@pytest.mark.parametrize("name", list_methods())
def test_methods_leave_mask_and_padding_to_the_text(bases, name):
    """Refused with a reason; or else what stands after the end of a text has no effect, merged or not."""
    if name not in FITTING:
        with pytest.raises(ValueError, match=REFUSED):
            adapted(bases("clip"), name)
        return
    for family in ("clip", "chinese_clip"):
        if family == "chinese_clip" and name in ("arc", "repadapter"):
            with pytest.raises(ValueError, match="follow its sub-layers"):
                adapted(bases(family), name)
            continue
        model = adapted(bases(family), name)
        base = model.get_base_model()
        tokens = base._tokens
        with torch.no_grad():
            expected = base.encode_tokens(tokens)
            more = torch.randint(3, 20, (len(tokens), 7))  # no end and no padding
            ids = torch.where(tokens.ids == 0, 5, tokens.ids)
            mask = None if tokens.mask is None else F.pad(tokens.mask, (0, 7))
            longer = base.towers.encode_text(torch.cat([ids, more], 1), mask)
            torch.testing.assert_close(longer, expected, atol=2e-5, rtol=2e-5)
            with model.disable_adapter():
                assert not torch.allclose(base.encode_tokens(tokens), expected, atol=1e-4)
        if get_method(name).mergeable:
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged.encode_tokens(tokens).detach(), expected, atol=1e-4, rtol=1e-4)


def norm_by_hand(norm, x):
    return F.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps)


def text_by_hand(base, family, ids, mlp, attention_output):
    """The text tower in plain torch; `mlp` and `attention_output` get the index of the block first."""
    text = base.encoder.text_model
    positions = text.embeddings.position_embedding.weight[: ids.shape[1]]
    x = text.embeddings.token_embedding.weight[ids] + positions
    length = ids.shape[1]
    hidden = torch.full((length, length), -torch.inf).triu(1) if family == "clip" else torch.zeros(length, length)
    for index, block in enumerate(text.encoder.layers):
        normed = norm_by_hand(block.layer_norm1, x)
        own = block.self_attn
        q, k, v = (
            (normed @ p.weight.T + p.bias).unflatten(-1, (2, 8)).transpose(1, 2)
            for p in (own.q_proj, own.k_proj, own.v_proj)
        )
        mixed = ((q @ k.mT / 8**0.5 + hidden).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attention_output(index, mixed @ own.out_proj.weight.T + own.out_proj.bias)
        normed = norm_by_hand(block.layer_norm2, x)
        inner = block.mlp.activation_fn(normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        x = x + inner @ block.mlp.fc2.weight.T + block.mlp.fc2.bias + mlp(index, x)

    x = norm_by_hand(text.final_layer_norm, x)
    if family == "siglip":
        return x[:, -1] @ text.head.weight.T + text.head.bias
    ends = (ids == 30).int().argmax(1)
    return x[torch.arange(len(ids)), ends] @ base.encoder.text_projection.weight.T


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_equations_equal_plain_torch(bases, family):
    base = bases(family)
    ids = base._tokens.ids
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, "adaptformer")
    parts = [block.adapters.adaptformer_mlp["default"] for block in find_blocks(base)]

    def bottleneck(index, x):
        part = parts[index]
        return part.scale * (F.relu(x @ part.down.weight.T + part.down.bias) @ part.up.weight.T + part.up.bias)

    with torch.no_grad():
        expected = text_by_hand(base, family, ids, bottleneck, lambda _, x: x)
        torch.testing.assert_close(base.encode_tokens(base._tokens), expected, atol=1e-5, rtol=1e-5)
        plain = text_by_hand(model.unload(), family, ids, lambda _, x: 0.0, lambda _, x: x)
        assert not torch.allclose(expected, plain, atol=1e-2)
    assert all(torch.equal(value, weights[key]) for key, value in base.state_dict().items())

    model = adapted(base, "ssf", modules_to_save=[])
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():  # of the attention's output alone
        if "ssf" in name and "out_proj" not in name:
            parameter.fill_(1.0 if name.endswith("scale") else 0.0)
    ssf = [block.self_attn.out_proj.ssf_output["default"] for block in base.encoder.text_model.encoder.layers]
    with torch.no_grad():
        got = base.encode_tokens(base._tokens)
        model.unload()
        expected = text_by_hand(base, family, ids, lambda _, x: 0.0, lambda i, x: x * ssf[i].scale + ssf[i].shift)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def find_blocks(base):
    return [base.get_submodule(block.path) for block in find_backbone(base, tower="text").blocks]


@pytest.mark.parametrize("family", ["siglip", "dual"])
def test_both_towers_are_each_alone(bases, folders, tmp_path, family):
    """With equal seeds of each part, the towers together compute what they compute alone."""
    base = bases(family)
    model = adapted(base, "fact", "both")
    inside, beside = in_towers(model)
    assert inside > 0
    assert beside > 0
    both = model(**images(family))
    both.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    state = peft.get_peft_model_state_dict(model)
    for tower, path in (("text", "text_model"), ("vision", "vision_model")):
        alone = adapted(bases(family), "fact", tower)
        mine = {key: value for key, value in state.items() if path in key}
        assert set(mine) == set(peft.get_peft_model_state_dict(alone))
        peft.set_peft_model_state_dict(alone, mine)
        output = alone(**images(family))
        name = "text_embeds" if tower == "text" else "image_embeds"
        torch.testing.assert_close(getattr(output, name), getattr(both, name), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path), base=folders[family])
    torch.testing.assert_close(again(**images(family)).logits, both.logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**images(family)).logits, both.logits, atol=1e-4, rtol=1e-4)


def test_adapters_of_both_towers_stand_beside_each_other(bases):
    base = bases("clip")
    before = base(**images("clip")).logits
    model = adapted(base, "adaptformer", "vision")
    vision = model(**images("clip")).logits
    model.add_adapter("texts", small_config(get_method("adaptformer"), tower="text"))
    torch.testing.assert_close(model(**images("clip")).logits, vision)
    model.set_adapter("texts")
    texts = model(**images("clip")).logits
    assert not torch.allclose(texts, before, atol=1e-3)
    with pytest.raises(ValueError, match="'texts' acts in the text tower, whose texts are those of all samples"):
        model(**images("clip"), adapter_names=["default", "texts", "default"])
    with pytest.raises(ValueError, match="'texts' acts in the text tower"):  # it is active
        model(**images("clip"), adapter_names=["default", "__base__", "default"])
    model.set_adapter("default")
    mixed = model(**images("clip"), adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[[0, 2]], vision[[0, 2]])
    model.set_adapter("texts")
    model.delete_adapter("default")
    torch.testing.assert_close(model(**images("clip")).logits, texts)
    torch.testing.assert_close(model.unload()(**images("clip")).logits, before)


def test_what_does_not_fit_a_text_leaves_the_model_as_it_was(bases):
    base = bases("clip")
    before = {name: (type(module), parameter) for name, module in base.named_modules() for parameter in [module]}
    for config, message in (
        (hf_visual_peft.VPTConfig(tower="text"), "CLIPTextModel: no tokens can join a text.*CoOpConfig"),
        (hf_visual_peft.VPTConfig(tower="both"), "CLIPTextModel: no tokens can join a text"),
        (hf_visual_peft.ConvpassConfig(tower="both", r=2), "CLIPTextModel: the tokens of a text lie in no image"),
        (hf_visual_peft.LSTConfig(tower="text"), "a side network reads images"),
        (hf_visual_peft.VPConfig(tower="text"), "it acts on the images"),
        (hf_visual_peft.GPSConfig(tower="text"), "it chooses from labelled images"),
        (hf_visual_peft.LinearProbeConfig(tower="text"), "no text tower has"),
        (hf_visual_peft.SSFConfig(tower="text", layers_to_transform=[2]), "CLIPTextModel has 2 blocks, 0 to 1"),
        (hf_visual_peft.SSFConfig(tower="text", backbone="encoder.vision_model"), "has no text tower"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(base, config)
        assert {name: (type(module), module) for name, module in base.named_modules()} == before
    with pytest.raises(ValueError, match=r"SSFConfig.tower is 'texts': must be one of 'vision', 'text', 'both'"):
        hf_visual_peft.SSFConfig(tower="texts")
    with pytest.raises(ValueError, match=r"SSFConfig.tower is 'text': must be 'vision', its default"):
        hf_visual_peft.SSFConfig(tower="text", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="which concerns all parts: set CompositeConfig.tower"):
        hf_visual_peft.CompositeConfig(parts=[hf_visual_peft.SSFConfig(tower="text")])


def test_models_without_a_known_text_tower():
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(BackboneError, match=r"ViTModel has no text tower.*register_architecture.*tower='text'"):
        find_backbone(vit, tower="text")
    with pytest.raises(BackboneError, match="tower is 'both': must be one of 'vision', 'text'"):
        find_backbone(vit, tower="both")
    table = hf_visual_peft.Architecture(backbones=("MyText",), blocks="layers", patch_embedding="embed")
    with pytest.raises(ValueError, match=r"patch_embedding is 'embed': must be \(\) for a text tower"):
        hf_visual_peft.register_architecture(table, "text")


class OwnBert(nn.Module):
    """A text model whose class no table knows."""

    def __init__(self, bert):
        super().__init__()
        self.embeddings, self.stack = bert.embeddings, bert.encoder.layer


def test_a_text_tower_of_the_users_own_is_registered(bases):
    base = bases("dual")
    base.encoder.text_model = OwnBert(base.encoder.text_model)
    with pytest.raises(BackboneError, match=r"its OwnBert has no role table.*backbones=\('OwnBert',\)"):
        find_backbone(base.encoder, tower="text")
    known = find_backbone(bases("dual"), tower="text").architecture
    hf_visual_peft.register_architecture(dataclasses.replace(known, backbones=("OwnBert",), blocks="stack"), "text")
    assert [block.path for block in find_backbone(base, tower="text").blocks] == [
        "encoder.text_model.stack.0",
        "encoder.text_model.stack.1",
    ]
    with pytest.raises(BackboneError, match="OwnBert"):  # it is no vision backbone
        find_backbone(base.encoder.text_model)


def test_a_text_tower_by_itself():
    model = AutoModel.from_config(FAMILIES["clip"]()[0].config.text_config).eval()
    assert find_backbone(model, tower="text").path == ""
    ids = torch.tensor([[1, 5, 6, 30], [1, 7, 30, 0]])
    before = model(ids).pooler_output
    model = adapted(model, "adaptformer")
    assert not torch.allclose(model(ids).pooler_output, before, atol=1e-3)


@pytest.mark.parametrize("tower", ["text", "both"])
@pytest.mark.parametrize("name", ["adaptformer", "ssf"])
def test_chunks_and_checkpoints_of_texts_change_no_gradient(bases, name, tower):
    gradients = []
    for chunk, checkpointing in ((256, False), (3, False), (3, True)):
        base = bases("clip")
        base.config.class_chunk = chunk
        if checkpointing:
            base.gradient_checkpointing_enable()
        model = adapted(base, name, tower, **({"dropout": 0.0} if name == "adaptformer" else {})).train()
        model(**images("clip"), labels=LABELS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], atol=1e-5, rtol=1e-4)


def test_features_of_classes_are_kept_only_while_nothing_of_them_trains(bases):
    base = bases("clip")
    runs = []
    base.encoder.text_model.register_forward_hook(lambda *_: runs.append(1))
    model = adapted(base, "ssf", "vision").train()
    runs.clear()
    for _ in range(3):
        model(**images("clip"), labels=LABELS).loss.backward()
    assert len(runs) == 1
    model = adapted(model.unload(), "ssf", "both").train()
    runs.clear()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1, fused=True)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(**images("clip"), labels=LABELS).loss.backward()
        optimizer.step()
        with torch.no_grad():  # as an evaluation between steps does
            model.eval()
            seen.append(model(**images("clip")).text_embeds)
            model.train()
    assert len(runs) == 6
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)


@torch.no_grad()
def test_kept_features_follow_scales_and_copies_of_adapters(bases):
    base = bases("clip")
    config = peft.LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["text_projection"], r=2
    )
    model = peft.get_peft_model(base, config).eval()
    copied = base.encoder.text_projection.modules_to_save["default"]
    copied.weight.mul_(-1)
    first = model(**images("clip")).text_embeds
    with model.disable_adapter():
        plain = model(**images("clip")).text_embeds
    torch.testing.assert_close(plain, bases("clip")(**images("clip")).text_embeds)
    for layer in base.encoder.text_model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("default", 3.0)
    assert not torch.allclose(model(**images("clip")).text_embeds, first, atol=1e-3)
    base.encoder.text_projection.enable_adapters(False)
    assert not torch.allclose(model(**images("clip")).text_embeds, first, atol=1e-1)


def test_image_features_are_cached_only_beside_a_frozen_image_tower(bases, tmp_path):
    rows = [{"pixel_values": p, "labels": i} for i, p in enumerate(images("clip")["pixel_values"])]
    with pytest.raises(ValueError, match="No block of the backbone is frozen"):
        hf_visual_peft.FeatureCache(adapted(bases("clip"), "adaptformer", "both"), tmp_path).cached([rows], key=["i"])
    model = adapted(bases("clip"), "adaptformer")
    assert_learns_from_cache(model, "clip", tmp_path)
    assert model.get_base_model().class_names == NAMES
