"""Images of several sizes in one batch: an adapter makes of an image the same, whatever it is batched with."""

import pytest
import torch
from families import FAMILIES, WIDTH
from peft import get_peft_model

import hf_visual_peft
from hf_visual_peft import LASTConfig
from hf_visual_peft.coverage.sizes import small_fields
from hf_visual_peft.sites.masks import seen_tokens


FAMILY = FAMILIES["siglip2"]
REFUSED = {  # they need images, or images of one size
    *("aim", "attnscale", "hst", "sidetuning", "stadapter", "vitadapter"),
    *("autovp", "evppixel", "ilmvp", "lorvp", "vapt", "vp", "evp", "convlora"),
    *("davpt", "sparsetuning"),  # they read CLS, or take tokens out of the stream
}
METHODS = {name: method.config_cls for name, method in hf_visual_peft.list_methods().items() if name not in REFUSED}


def config_of(config_cls):
    return config_cls(**small_fields(config_cls, {}, WIDTH), init_weights=False, modules_to_save=[])


def padded_and_alone(dtype=torch.float64):
    """A batch of a 4 x 4 and a 3 x 5 grid, and the second image without its padding."""
    inputs = FAMILY.inputs(2)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    inputs["pixel_values"][1, 15:] = 7.0  # whatever stands in the padding
    alone = {"spatial_shapes": inputs["spatial_shapes"][1:]}
    alone |= {name: inputs[name][1:, :15] for name in ("pixel_values", "pixel_attention_mask")}
    return inputs, alone


def assert_alone_as_padded(model, tolerance=1e-12):
    inputs, alone = padded_and_alone(next(model.parameters()).dtype)
    with torch.no_grad():
        padded, expected = model(**inputs).logits[1:], model(**alone).logits
    assert (padded - expected).abs().max() < tolerance * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("config_cls", METHODS.values(), ids=METHODS)
def test_an_image_alone_is_as_the_same_image_padded(config_cls):
    torch.manual_seed(1)
    assert_alone_as_padded(get_peft_model(FAMILY.model(), config_of(config_cls)).double().eval())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_last_hides_what_the_blocks_hide(attention, layers):
    """The masks of both kinds of attention: added to the logits, and boolean; and where blocks are passed by."""
    base = FAMILY.model()
    base.set_attn_implementation(attention)
    torch.manual_seed(1)
    model = get_peft_model(base, LASTConfig(r=4, init_weights=False, layers_to_transform=layers)).double().eval()
    assert_alone_as_padded(model)
    inputs, _ = padded_and_alone()
    with torch.no_grad():
        adapted = model(**inputs).logits
        with model.disable_adapter():
            assert (model(**inputs).logits - adapted).abs().max() > 1e-3


def test_last_trains_on_padded_images_as_on_images_alone():
    torch.manual_seed(1)
    model = get_peft_model(FAMILY.model(), LASTConfig(r=4, init_weights=False)).double().eval()
    gradients = []
    for inputs, row in zip(padded_and_alone(), (1, 0), strict=True):
        model.zero_grad()
        model(**inputs).logits[row].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


SEEN = torch.tensor([[True, True, False], [True, True, True]])
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(SEEN, id="by keys"),
        pytest.param(SEEN.long(), id="by keys, integers"),
        pytest.param(SEEN[:, None, None].expand(2, 1, 3, 3), id="by queries"),
        pytest.param(SEEN[:, None, None], id="one for all queries"),
        pytest.param(SEEN[:, None].expand(2, 3, 3) & torch.ones(3, 3).tril().bool(), id="causal"),
        pytest.param(torch.where(SEEN, 0.0, LOWEST)[:, None, None], id="added"),
        pytest.param(torch.where(SEEN, 0.0, -torch.inf)[:, None, None].expand(2, 4, 3, 3), id="added, by heads"),
    ],
)
def test_masks_tell_the_padding(mask):
    assert torch.equal(seen_tokens(mask, "attention_mask"), SEEN)


def test_no_mask_and_masks_that_tell_nothing():
    assert seen_tokens(None, "attention_mask") is None
    assert seen_tokens(torch.randn(1, 2, 3, 3), "attention_mask").all()  # a bias hides nothing
    with pytest.raises(ValueError, match="attention_mask: a object does not say which tokens are padding"):
        seen_tokens(object(), "attention_mask")
