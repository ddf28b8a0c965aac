"""Methods of the surveys that are not built, for the page of methods."""

from __future__ import annotations

from ..tables import format_table


# name, arXiv identifier, what of it is known only from the abstract or by hearsay
_METHODS = (
    ("ALoRE", "2412.08341", "how the Kronecker experts are placed, scaled and started"),
    ("CVP", "2303.00198", "kernels and steps at test time, and the loss of another model that they follow"),
    ("Dyn-Adapter", "2407.14302", "its early heads, and what makes a sample leave there"),
    ("EXPRES", "2303.15591", "which norms get prompts, whether the MLP does, and what the head reads"),
    ("HTA", "2410.22952", "where the Householder vectors stand, and how the low-rank part is started"),
    ("iConFormer", "2409.02838", "the size of the kernels, what generates them, and how they are normalised"),
    ("iVPT", "2404.05207", "the gate of prompts and the choice of salient tokens; `ProVPConfig` has the mixing alone"),
    ("LION", "2303.09992", "the solver of the implicit layers and their widths"),
    ("LoSA", "2402.02887", "the mixer of features and what it reads"),
    ("PESF-KD", "2205.15308", "the weights of the losses, and which module of the teacher trains"),
    ("Polyhistor", "2210.03265", "sizes of the template kernels, and where the hyper-network is shared"),
    ("Pro-tuning", "2207.14381", "the blocks at the stages; `MonaConfig` and `E3VAConfig` are near relatives"),
    ("VMT-Adapter", "2312.08733", "the module of each task, and what the lighter form shares"),
)


def not_built() -> str:
    """The section of the page."""
    header = ("method", "paper", "unknown here")
    rows = [(name, f"[arXiv {paper}](https://arxiv.org/abs/{paper})", unknown) for name, paper, unknown in _METHODS]
    return "\n".join(
        [
            "## Not built",
            "",
            "Neither code nor the full text of these papers could be had, and their abstracts leave open what a",
            "faithful implementation needs. They are not guessed at: a method here equals its equation.",
            "",
            format_table(header, rows),
            "",
            "SA2VP ([arXiv 2312.10376](https://arxiv.org/abs/2312.10376)) is not built either, though its code is",
            "known. A second stream of as many tokens runs through the same blocks, and both read each other in",
            "turn. Here a block runs once in a pass, inside of its model's own forward.",
            "",
            "PLOT++, the form of [PLOT](https://arxiv.org/abs/2210.01253) for image transformers, is not built",
            "either. How its four sets of image tokens meet the texts, and the lengths of its two stages, could",
            "not be verified. `PLOTConfig` has PLOT itself, on transformers too.",
            "",
            "Not built yet, though their code is known: the prompt pool of LPT",
            "([arXiv 2210.01033](https://arxiv.org/abs/2210.01033)), DAM-VP",
            "([arXiv 2303.08138](https://arxiv.org/abs/2303.08138)), and BlackVIP",
            "([arXiv 2303.14773](https://arxiv.org/abs/2303.14773)).",
            "",
        ]
    )
