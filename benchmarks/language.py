"""Cost of methods for class names on CLIP ViT-B/16 with random weights: `python benchmarks/language.py PART`.

step: a training step of KgCoOp from features of images, relative to forward and backward of the text tower alone on
the same prompts, which are cut to the longest. heads: a step of the head methods from features of images, 100 classes,
16 images each, in milliseconds, for a batch of 256 as in the papers and for all 1,600 images at once. memory: peak
memory of one step with 1,000 classes, with gradient checkpointing, in GiB, of the whole process, of KgCoOp or, with
--tower text, of AdaptFormer in the text tower, whose gradients cross all classes' texts as well. Times are
of one thread of the CPU, which other work does not lengthen: the shortest of several, in turn.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import hf_visual_peft


WORDS = [
    "a",
    "photo",
    "of",
    "class",
    ".",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "zero",
]
HEADS = ("taskres", "cross_modal", "clip_adapter", "clap", "tip_adapter")


def classifier(classes: int) -> hf_visual_peft.ZeroShotClassifier:
    """CLIP ViT-B/16 whose names are five words long, twelve tokens with prompts."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", *WORDS])} | {"</s>": 49407}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    encoder = CLIPModel(CLIPConfig(text_config={"eos_token_id": 49407}, vision_config={"patch_size": 16}))
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    names = ["class " + " ".join(digits[int(digit)] for digit in f"{number:04}") for number in range(classes)]
    config = hf_visual_peft.ZeroShotConfig(encoder.config, names)
    return hf_visual_peft.ZeroShotClassifier(config, encoder.eval(), tokenizer)


def batch(classes: int, shots: int) -> dict[str, torch.Tensor]:
    """Features of images, and their labels."""
    return {"image_features": torch.randn(classes * shots, 512), "labels": torch.arange(classes).repeat(shots)}


def fastest(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each, in seconds; they take turns."""
    found = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            found[name] = min(found[name], time.process_time() - start)
    return found


def step(rounds: int, classes: int) -> None:
    """KgCoOp beside the text tower."""
    base = classifier(classes)
    base.requires_grad_(False)
    model = get_peft_model(base, hf_visual_peft.KgCoOpConfig())
    images, tokens = batch(classes, 1), base.texts_with_slots(4, "end")
    rows = model.base_model.model.adapters.active().vectors

    def tower() -> None:
        vectors = rows.detach().clone().requires_grad_()
        base.encode_tokens(tokens, vectors[None]).sum().backward()

    def whole() -> None:
        model(**images).loss.backward()

    whole()  # features of the templates are kept from then on
    found = fastest({"text tower": tower, "KgCoOp": whole}, rounds)
    print(f"{classes} classes, {tokens.ids.shape[1]} tokens: text tower {found['text tower']:.2f} s, KgCoOp ", end="")
    print(f"{found['KgCoOp']:.2f} s, ratio {found['KgCoOp'] / found['text tower']:.3f}")


def heads(rounds: int) -> None:
    """The head methods."""
    base, images = classifier(100), batch(100, 16)
    order = torch.randperm(1600)
    for name in HEADS:
        config_cls = hf_visual_peft.list_language_methods()[name].config_cls
        config = config_cls(train_keys=True) if name == "tip_adapter" else config_cls()
        model = get_peft_model(base, config)
        if "support_size" in vars(config):
            hf_visual_peft.fit(model, [images])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def run(part: dict[str, torch.Tensor], model: Any = model, optimizer: Any = optimizer) -> None:
            model(**part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        runs: dict[str, Callable[[], Any]] = {
            str(size): partial(run, {key: value[order[:size]] for key, value in images.items()})
            for size in (256, 1600)
        }
        runs["256"]()
        found = fastest(runs, rounds)
        print(f"{name}: {', '.join(f'{1000 * seconds:.1f} ms with {size} images' for size, seconds in found.items())}")
        base = model.unload()


def memory(classes: int, tower: str | None) -> None:
    """One step with many classes."""
    base = classifier(classes)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    config = hf_visual_peft.AdaptFormerConfig(tower=tower) if tower else hf_visual_peft.KgCoOpConfig()
    model = get_peft_model(base, config).train()
    model(pixel_values=torch.randn(1, 3, 224, 224), labels=torch.tensor([0])).loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    name = f"adaptformer, tower={tower!r}" if tower else "kgcoop"
    print(f"{name}, {classes} classes: peak memory of the process {peak:.2f} GiB")


def main() -> None:
    """Measure a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["step", "heads", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tower", choices=["text", "both"], help="memory of AdaptFormer there, and not of KgCoOp")
    parser.add_argument("--classes", type=int, help="default: 20 for step, 1000 for memory")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.part == "step":
        step(arguments.rounds, arguments.classes or 20)
    elif arguments.part == "heads":
        heads(arguments.rounds)
    else:
        memory(arguments.classes or 1000, arguments.tower)


if __name__ == "__main__":
    main()
