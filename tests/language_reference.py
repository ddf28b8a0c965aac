"""The arithmetic of methods for class texts in plain torch, on a CLIP of two small towers with weights by a formula.

`python tests/language_vectors.py` computes figures with it. Nothing here comes from the library or from transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from reference_backbone import Weights, numbers
from torch import Tensor


NAMES = ["cat", "big_dog", "apple pie", "sea"]
LETTERS = "abcdefghijklmnopqrstuvwxyz."
LABELS, SUPPORT = torch.tensor([0, 3, 2]), torch.tensor([0, 1, 2, 2, 1, 0, 3, 0])
SIZE, PATCH, HEADS, DEPTH, SCALE = 16, 8, 2, 2, 2.5
ONE_HOT = torch.eye(len(NAMES))


def pixels(name: str, count: int) -> Tensor:
    return numbers(name, (count, 3, SIZE, SIZE), 1.0)


def ids(text: str) -> list[int]:
    """Of the start, the letters and the end."""
    return [1, *(3 + LETTERS.index(letter) for letter in text.lower() if letter in LETTERS), 3 + len(LETTERS)]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Clip:
    """OpenAI's CLIP: openai/CLIP: clip/model.py.

    Args:
        weights: by their names in transformers' `CLIPModel`.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def block(self, name: str, x: Tensor, causal: bool) -> Tensor:
        w = self.weights
        inner = w.norm(f"{name}.layer_norm1", x)
        query, key, value = (
            w.linear(f"{name}.self_attn.{kind}_proj", inner).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for kind in "qkv"
        )
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), float("-inf"))
        mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        x = x + w.linear(f"{name}.self_attn.out_proj", mixed)
        inner = quick_gelu(w.linear(f"{name}.mlp.fc1", w.norm(f"{name}.layer_norm2", x)))
        return x + w.linear(f"{name}.mlp.fc2", inner)

    def words(self, text: str) -> Tensor:
        """The vectors of the tokens of a text."""
        return self.weights["text_model.embeddings.token_embedding.weight"][ids(text)]

    def text(self, rows: list[Tensor], deep: dict[int, Tensor] | None = None) -> Tensor:
        """Features of texts from the vectors of their tokens; `deep`: by block, what stands at their slots."""
        found = []
        for number, vectors in enumerate(rows):
            x = vectors + self.weights["text_model.embeddings.position_embedding.weight"][: len(vectors)]
            x = x[None]
            for index in range(DEPTH):
                if deep and index in deep:
                    new = deep[index][number] if deep[index].ndim == 3 else deep[index]
                    x = torch.cat([x[:, :1], new[None], x[:, 1 + len(new) :]], 1)
                x = self.block(f"text_model.encoder.layers.{index}", x, causal=True)
            found.append(self.weights.norm("text_model.final_layer_norm", x)[0, -1])  # the end token
        return self.weights.linear("text_projection", torch.stack(found))

    def image(self, images: Tensor, tokens: dict[int, Tensor] | None = None, patches: bool = False) -> Tensor:
        """Features of images; `tokens`: by block, learned tokens at the end of the sequence."""
        w, name = self.weights, "vision_model.embeddings"
        x = F.conv2d(images, w[f"{name}.patch_embedding.weight"], stride=PATCH).flatten(2).transpose(1, 2)
        x = (
            torch.cat([w[f"{name}.class_embedding"].expand(len(x), 1, -1), x], 1)
            + w[f"{name}.position_embedding.weight"]
        )
        own = x.shape[1]
        for index in range(DEPTH):
            if tokens and index in tokens:
                x = torch.cat([x[:, :own], tokens[index].expand(len(x), -1, -1)], 1)
            if index == 0:
                x = w.norm("vision_model.pre_layrnorm", x)
            x = self.block(f"vision_model.encoder.layers.{index}", x, causal=False)
        x = w.linear("visual_projection", w.norm("vision_model.post_layernorm", x[:, :own]))
        return x[:, 1:] if patches else x[:, 0]

    def templates(self) -> Tensor:
        """Features of "a photo of a NAME."."""
        return self.text([self.words(f"a photo of a {name}.") for name in NAMES])

    def prompts(self, vectors: Tensor, before: str = "", middle: bool = False) -> list[Tensor]:
        """Texts that begin with learned vectors, or have the name in the middle of them."""
        rows = []
        for name in NAMES:
            tokens, letters = self.words(f"{before}{name}."), len(ids(name)) - 2
            half = len(vectors) // 2 if middle else len(vectors)
            parts = [tokens[:1], vectors[:half], tokens[1 : 1 + letters], vectors[half:], tokens[1 + letters :]]
            rows.append(torch.cat(parts) if middle else torch.cat([tokens[:1], vectors, tokens[1:]]))
        return rows

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        return self.weights["logit_scale"].exp() * unit(image) @ unit(text).T


@dataclass
class Result:
    """Logits of the images, and the loss; `gradients` where they are not those of the loss."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor] | None = None


@dataclass
class Reference:
    """A method's arithmetic.

    Attributes:
        result: from CLIP, the images, and the adapter's weights.
        source: whose arithmetic it is.
        fields: of the config.
    """

    result: Callable[[Clip, Tensor, Weights], Result]
    source: str
    fields: dict[str, Any] = field(default_factory=dict)


def plain(logits: Tensor, more: Tensor | float = 0.0) -> Result:
    return Result(logits, F.cross_entropy(logits, LABELS) + more)


def coop(clip: Clip, x: Tensor, w: Weights) -> Result:
    return plain(clip.logits(clip.image(x), clip.text(clip.prompts(w["vectors"]))))


def kgcoop(clip: Clip, x: Tensor, w: Weights) -> Result:
    text = clip.text(clip.prompts(w["vectors"]))
    distance = 8 * (1 - (unit(text) * unit(clip.templates())).sum(-1).mean())
    return plain(clip.logits(clip.image(x), text), distance)


def prograd(clip: Clip, x: Tensor, w: Weights) -> Result:
    found, teacher = coop(clip, x, w), clip.logits(clip.image(x), clip.templates()).softmax(-1).detach()
    general = -(teacher * found.logits.log_softmax(-1)).sum(-1).mean()
    (g,), (h,) = (torch.autograd.grad(loss, w["vectors"], retain_graph=True) for loss in (found.loss, general))
    h = h / h.norm()
    return Result(found.logits, found.loss, {"vectors": g - (g * h).sum() * h if (g * h).sum() < 0 else g})


def meta(w: Weights, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    return w.linear("meta.2", act(w.linear("meta.0", x)))


def cocoop(clip: Clip, x: Tensor, w: Weights) -> Result:
    image = clip.image(x)
    shifts = meta(w, unit(image), torch.relu)
    rows = [
        clip.logits(f[None], clip.text(clip.prompts(w["vectors"] + m))) for f, m in zip(image, shifts, strict=True)
    ]
    return plain(torch.cat(rows))


def tcp(clip: Clip, x: Tensor, w: Weights) -> Result:
    text0 = clip.templates()
    own = meta(w, unit(text0), quick_gelu).unflatten(-1, w["vectors"].shape)
    text = clip.text(clip.prompts(w["vectors"]), {1: own})
    return plain(clip.logits(clip.image(x), text), 8 * (1 - F.cosine_similarity(text, text0).mean()))


def plot(clip: Clip, x: Tensor, w: Weights) -> Result:
    texts = unit(torch.stack([clip.text(clip.prompts(each)) for each in w["vectors"]]))
    similarity = torch.einsum("bld,nkd->bkln", unit(clip.image(x, patches=True)), texts)
    with torch.no_grad():
        kernel = ((similarity - 1) / 0.1).exp()
        left, right = torch.ones(kernel.shape[:3]), torch.ones(*kernel.shape[:2], kernel.shape[3])
        for _ in range(100):
            before = left
            left = 1 / kernel.shape[2] / torch.einsum("bkln,bkn->bkl", kernel, right)
            right = 1 / kernel.shape[3] / torch.einsum("bkln,bkl->bkn", kernel, left)
            if (left - before).abs().mean() < 1e-2:
                break
        plan = left[..., None] * kernel * right[..., None, :]
    return plain(clip.weights["logit_scale"].exp() * (plan * similarity).sum((2, 3)))


def joint(clip: Clip, x: Tensor, texts: list[Tensor], tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    text = clip.text(clip.prompts(texts[0]), dict(enumerate(texts[1:], 1)))
    return clip.image(x, dict(enumerate(tokens))), text


def ivlp(clip: Clip, x: Tensor, w: Weights) -> Result:
    return plain(clip.logits(*joint(clip, x, [w["texts.0"], w["texts.1"]], [w["images.0"], w["images.1"]])))


def maple(clip: Clip, x: Tensor, w: Weights) -> Result:
    texts = [w["texts.0"], w["texts.1"]]
    return plain(
        clip.logits(*joint(clip, x, texts, [w.linear(f"coupling.{n}", each) for n, each in enumerate(texts)]))
    )


def promptsrc(clip: Clip, x: Tensor, w: Weights) -> Result:
    image, text = joint(clip, x, [w["texts.0"], w["texts.1"]], [w["images.0"], w["images.1"]])
    image0, text0, logits = clip.image(x), clip.templates(), clip.logits(image, text)
    target = clip.logits(image0, text0).log_softmax(-1)
    more = 25 * (unit(text) - unit(text0)).abs().mean() + 10 * (unit(image) - unit(image0)).abs().mean()
    return plain(logits, more + (target.exp() * (target - logits.log_softmax(-1))).sum() / logits.numel())


def upt(clip: Clip, x: Tensor, w: Weights) -> Result:
    y = torch.cat([w.linear("text_down", w["text_prompts"]), w.linear("image_down", w["image_prompts"])])
    inner = w.norm("norm1", y)
    query, key, value = F.linear(inner, w["attention.in_proj_weight"], w["attention.in_proj_bias"]).chunk(3, -1)
    y = y + w.linear("attention.out_proj", (query @ key.T / key.shape[-1] ** 0.5).softmax(-1) @ value)
    y = y + w.linear("mlp.2", quick_gelu(w.linear("mlp.0", w.norm("norm2", y))))
    count = len(w["text_prompts"])
    text = clip.text(clip.prompts(w.linear("text_up", y[:count]), middle=True))
    return plain(clip.logits(clip.image(x, {0: w.linear("image_up", y[count:])}), text))


def clip_adapter(clip: Clip, x: Tensor, w: Weights) -> Result:
    image = clip.image(x)
    inner = w.linear("image.up", w.linear("image.down", image).relu()).relu()
    return plain(clip.logits(0.2 * inner + 0.8 * image, clip.templates()))


def support(clip: Clip) -> Tensor:
    return unit(clip.image(pixels("support", len(SUPPORT))))


def tip_adapter(clip: Clip, x: Tensor, w: Weights) -> Result:
    image = clip.image(x)
    memory = (-2.0 * (1 - unit(image) @ w["keys"].T)).exp() @ ONE_HOT[SUPPORT]
    return plain(clip.logits(image, clip.templates()) + 30 * clip.weights["logit_scale"].exp() / 100 * memory)


def taskres(clip: Clip, x: Tensor, w: Weights) -> Result:
    return plain(clip.logits(clip.image(x), clip.templates() + 0.5 * w["residual"]))


def clap(clip: Clip, x: Tensor, w: Weights) -> Result:
    text0 = clip.templates()
    right = clip.logits(support(clip), text0).softmax(-1)[torch.arange(len(SUPPORT)), SUPPORT]
    lam = torch.stack([right[k == SUPPORT].mean() for k in range(len(NAMES))])
    return plain(clip.logits(clip.image(x), w["weight"]), (lam * (w["weight"] - text0).square().sum(-1)).mean())


def lp_plus_plus(clip: Clip, x: Tensor, w: Weights) -> Result:
    image, text = unit(clip.image(x)), unit(clip.templates())
    return plain(image @ w["weight"].T + w["bias"] + w["alpha"] * (image @ text.T))


def proker(clip: Clip, x: Tensor, w: Weights) -> Result:
    images, text, image = support(clip).double(), unit(clip.templates()).double(), unit(clip.image(x)).double()
    kernel = (-1.5 * (1 - images @ images.T)).exp() + 0.05 * torch.eye(len(images)).double()
    dual = torch.linalg.inv(kernel) @ (ONE_HOT[SUPPORT].double() - images @ text.T)
    cosines = image @ text.T + (-1.5 * (1 - image @ images.T)).exp() @ dual
    return plain((clip.weights["logit_scale"].double().exp() * cosines).float())


def cross_modal(clip: Clip, x: Tensor, w: Weights) -> Result:
    scale = clip.weights["logit_scale"].exp()
    logits = scale * unit(clip.image(x)) @ w["weight"].T
    texts = F.cross_entropy(scale * unit(clip.templates()) @ w["weight"].T, torch.arange(len(NAMES)))
    return Result(logits, (F.cross_entropy(logits, LABELS) + texts) / 2)


def tuned(clip: Clip, w: Weights) -> Clip:
    """CLIP with some weights in the place of its own."""
    new = {key.partition(".")[2].replace("/", "."): value for key, value in w.items() if "/" in key or "logit" in key}
    return Clip(Weights({**clip.weights, **new}))


def wise_ft(clip: Clip, x: Tensor, w: Weights) -> Result:
    image = tuned(clip, w).image(x)
    head = clip.weights["logit_scale"].exp() * unit(clip.templates()) + w["residual"]
    return plain(unit(image) @ head.T)


def flyp(clip: Clip, x: Tensor, w: Weights) -> Result:
    own = tuned(clip, w)
    logits = own.logits(own.image(x), own.templates())
    pairs = logits[:, LABELS]
    return Result(logits, (F.cross_entropy(pairs, torch.arange(3)) + F.cross_entropy(pairs.T, torch.arange(3))) / 2)


def two_sfs(clip: Clip, x: Tensor, w: Weights) -> Result:
    own = tuned(clip, w)
    return plain(own.logits(own.image(x), own.templates()))


JOINT = {"num_virtual_tokens": 2, "num_vision_tokens": 2, "init_text": None, "depth": 2}
VLP = "muzairkhattak/multimodal-prompt-learning: trainers"
METHODS = {
    "clap": Reference(clap, "jusiro/CLAP: trainers/adapters.py"),
    "clip_adapter": Reference(clip_adapter, "gaopengcuhk/CLIP-Adapter: clip_adapter.py"),
    "cocoop": Reference(cocoop, "KaiyangZhou/CoOp: trainers/cocoop.py", {"init_text": "of", "reduction": 2}),
    "coop": Reference(coop, "KaiyangZhou/CoOp: trainers/coop.py", {"num_virtual_tokens": 3}),
    "cross_modal": Reference(cross_modal, "linzhiqiu/cross_modal_adaptation: train.py, all texts in each batch"),
    "flyp": Reference(flyp, "locuslab/FLYP: src/models/flyp_loss.py", {"soft_targets": False}),
    "ivlp": Reference(ivlp, f"{VLP}/independentVL.py", JOINT),
    "kgcoop": Reference(kgcoop, "htyao89/KgCoOp: trainers/kgcoop.py", {"init_text": "of"}),
    "lp_plus_plus": Reference(lp_plus_plus, "FereshteShakeri/FewShot-CLIP-Strong-Baseline: the logits"),
    "maple": Reference(maple, f"{VLP}/maple.py", {"init_text": None, "depth": 2}),
    "plot": Reference(plot, "CHENGY12/PLOT: trainers/plot.py, on patches",
                      {"num_prompts": 2, "num_virtual_tokens": 3}),
    "prograd": Reference(prograd, "BeierZhu/Prompt-align", {"num_virtual_tokens": 3}),
    "proker": Reference(proker, "the paper's kernel ridge regression; the code has the correction times lam"),
    "promptsrc": Reference(promptsrc, "muzairkhattak/PromptSRC: trainers/promptsrc.py", JOINT),
    "taskres": Reference(taskres, "geekyutao/TaskRes: trainers/taskres.py"),
    "tcp": Reference(tcp, "htyao89/Textual-based_Class-aware_prompt_tuning: trainers/tcp.py",
                     {"init_text": "of", "hidden": 6, "block": 1}),
    "tip_adapter": Reference(tip_adapter, "gaopengcuhk/Tip-Adapter: main.py, alpha in units of the scale / 100",
                             {"alpha": 30.0, "beta": 2.0, "train_keys": True}),
    "two_sfs": Reference(two_sfs, "FarinaMatteo/rethinking_fewshot_vlms: the first stage"),
    "upt": Reference(upt, "sIncerass/MVLPT: trainers/mvlpt.py",
                     {"num_virtual_tokens": 4, "num_vision_tokens": 2, "hidden": 8}),
    "wise_ft": Reference(wise_ft, "mlfoundations/wise-ft: src/models/modeling.py, the scale in the head"),
}  # fmt: skip
