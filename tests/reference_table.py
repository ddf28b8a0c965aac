"""Every method's plain arithmetic, with where it was read and the fields that it has here.

Further forms of a method have a word behind its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import reference_choices as choices
import reference_methods as methods
import reference_side as side
import torch.nn.functional as F
from reference_backbone import ROLES, WIDTH, Vit, Weights
from reference_methods import at_pixels, beside_linears, blockwise, canvas
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """A method's arithmetic.

    Attributes:
        logits: of the plain transformer with the adapter.
        source: whose arithmetic it is: a file of the authors' repository, or the paper where none was compared.
        fields: of the config.
        identity: whether the fresh adapter changes nothing.
        chooses: whether it chooses from data.
        frames: of the videos it reads.
        early: whether these become one before the last norm.
    """

    logits: Callable[[Vit, Weights], Tensor]
    source: str
    fields: dict[str, Any] = field(default_factory=dict)
    identity: bool = True
    chooses: bool = False
    frames: int = 1
    early: bool = False


ATTENTION = ("query", "key", "value")
METHODS = {
    "adapterbias": Reference(beside_linears(("fc2",), methods.adapterbias), "the paper"),
    "adapterplus": Reference(blockwise(methods.adapterplus), "visinf/adapter_plus: vit_adapter.py", {"r": 4}, False),
    "adaptformer": Reference(blockwise(methods.adaptformer), "ShoufaChen/AdaptFormer: models/adapter.py", {"r": 4}),
    "aim": Reference(blockwise(methods.aim), "taoyang1122/adapt-image-models: vit_clip.py", frames=2),
    "aim-positions": Reference(
        blockwise(methods.aim),
        "taoyang1122/adapt-image-models: vit_clip.py, but for where the embedding enters",
        {"num_frames": 3},
        frames=2,
    ),
    "apla": Reference(beside_linears(("output",), methods.apla), "MoeinSorkhei/APLA", {"r": WIDTH}),
    "apt": Reference(
        blockwise(methods.apt), "wgcban/apt: modeling_VPT.py", {"num_virtual_tokens": 3, "dropout": 0.1}, False
    ),
    "arc": Reference(methods.arc, "DavidYanAnDe/ARC: Model/ARC_ViT.py", {"r": 4}, False),
    "attnscale": Reference(blockwise(methods.attnscale), "the paper"),
    "autovp": Reference(at_pixels(canvas(16)), "the paper", {"inner_size": 16}, False),
    "bapat": Reference(
        methods.bapat,
        "the paper, and bruceyo/V-PETL: models/video_swin_transformer_patt.py",
        {"attention_r": 3, "r": 4, "dropout": 0.1},
        False,
    ),
    "biadaptformer": Reference(
        blockwise(methods.biadaptformer),
        "JieShibo/PETL-ViT: binary_adapter/adaptformer.py",
        {"r": 4, "bits": 2},
        False,
    ),
    "bilora": Reference(
        beside_linears(("query", "value"), methods.bilora),
        "JieShibo/PETL-ViT: binary_adapter/lora.py",
        {"r": 4, "bits": 2},
        False,
    ),
    "bitfit": Reference(methods.bitfit, "the paper"),
    "cara": Reference(beside_linears(ROLES, methods.cara), "BonnBytes/CaRA: src/cara/cara.py", {"r": 3}),
    "colin": Reference(blockwise(methods.colin), "DongshuoYin/CoLin: swin_colin.py", {"r": 5, "rank": 3}, False),
    "compacter": Reference(blockwise(methods.compacter), "the paper", {"r": 4, "n": 2}, False),
    "composite": Reference(
        methods.composite,
        "the papers of its parts",
        {
            "parts": [
                {"method": "vpt", "num_virtual_tokens": 3, "dropout": 0.1},
                {"method": "sharedlora", "r": 4},
                {"method": "pfeiffer", "r": 4, "dropout": 0.1},
            ]
        },
        False,
    ),
    "consolidator": Reference(
        beside_linears(ROLES, methods.consolidator),
        "THU-MIG/Consolidator: model/vision_transformer_timm.py",
        {"groups": 8, "shuffle": True, "drop_path": 0.1},
        False,
    ),
    "convlora": Reference(
        beside_linears(ATTENTION, methods.convlora),
        "autogluon: adaptation_layers.py",
        {"r": 2, "experts": 3, "alpha": 4.0, "dropout": 0.1},
    ),
    "convpass": Reference(blockwise(methods.convpass), "JieShibo/PETL-ViT: convpass/convpass.py", {"r": 4}),
    "cvpt": Reference(
        blockwise(methods.cvpt), "Lingyun0419/CVPT: CVPT.py", {"num_virtual_tokens": 3, "dropout": 0.1}, False
    ),
    "davpt": Reference(
        blockwise(methods.davpt),
        "Noahsark/DA-VPT: models/vpt.py",
        {"num_virtual_tokens": 3, "num_proxies": 2, "norm": "l2", "dropout": 0.1},
        False,
        chooses=True,
    ),
    "difffit": Reference(methods.difffit, "the paper"),
    "dtl": Reference(side.dtl, "heekhero/DTL: models/vision_transformer.py"),
    "dtl-kernel": Reference(side.dtl, "heekhero/DTL: models/vision_transformer.py", {"plus": True, "kernel_size": 3}),
    "dyt": Reference(blockwise(methods.dyt), "the paper", {"r": 4}, False),
    "ett": Reference(
        methods.ett,
        "chmxu/eTT_TMLR2022: models/vit_dino.py, models/pa_prefix.py",
        {"num_virtual_tokens": 3, "reparam_dim": 5, "dropout": 0.1},
        False,
        chooses=True,
    ),
    "e2vpt": Reference(
        blockwise(methods.e2vpt),
        "ChengHan111/E2VPT: src/models/vit_prompt/vit_prompt_VK.py, vit_backbones/vit_changeVK.py",
        {"num_virtual_tokens": 3, "num_kv_tokens": 2, "pieces": 4, "dropout": 0.1},
        False,
    ),
    "e3va": Reference(side.e3va, "the paper", {"r": 4, "rank": 2}),
    "efft": Reference(
        beside_linears(ROLES, methods.efft),
        "Dongping-Chen/EFFT-EFfective-Factor-Tuning: methods/Set_EFFT.py",
        {"r": 4},
    ),
    "evp": Reference(methods.evp, "tianrun-chen/SAM-Adapter-PyTorch, after EVP's code", {"r": 3}, False),
    "evppixel": Reference(at_pixels(methods.evp_pixel), "the paper", {"width": 3}, False),
    "fact": Reference(
        beside_linears(ROLES, methods.fact), "JieShibo/PETL-ViT: FacT/fact_tk.py", {"variant": "tk", "r": 4}
    ),
    "fact-tt": Reference(
        beside_linears(ROLES, methods.fact_tt), "JieShibo/PETL-ViT: FacT/fact_tt.py", {"variant": "tt", "r": 4}
    ),
    "gatedprompt": Reference(
        methods.gatedprompt,
        "ryongithub/GatedPromptTuning: src/models/vit_prompt/vit_mae.py",
        {"num_virtual_tokens": 3, "dropout": 0.1},
        False,
    ),
    "gist": Reference(methods.gist, "JCruan519/GIST: models/vision_transformer.py", {"r": 2}, False),
    "gps": Reference(choices.gps, "FightingFighting/GPS: utils/pruning.py, loss_utils.py", chooses=True),
    "houlsby": Reference(blockwise(methods.houlsby), "the paper", {"r": 4, "dropout": 0.1}, False),
    "hst": Reference(
        side.hst,
        "AFeng-x/HST: models/vit_hsn.py, vit_custom_modules.py",
        {"dims": (4, 6, 8), "num_heads": (2, 2, 4), "drop_path": 0.2},
        False,
    ),
    "hydra": Reference(
        beside_linears(("output", "fc2"), methods.hydra),
        "extremebird/Hydra: vtab1k/hydra.py",
        {"r": 2, "dropout": 0.1},
    ),
    "ilmvp": Reference(at_pixels(canvas(16)), "the paper", {"inner_size": 16}, False),
    "kadaptation": Reference(
        beside_linears(("query", "value"), methods.kadaptation),
        "eric-ai-lab/PEViT: evaluation/model.py, with factors of the values' own",
        {"n": 4, "scale": 10.0},
    ),
    "kradapter": Reference(
        beside_linears(ROLES, methods.kradapter),
        "PaulAlbert31/KRAdapter: approximate_weight.py, cut before it is transposed",
        {"roles": ROLES},
    ),
    "laeadapter": Reference(blockwise(methods.laeadapter), "gqk/LAE", {"r": 4, "depth": 2}),
    "laelora": Reference(beside_linears(("key", "value"), methods.laelora), "gqk/LAE", {"r": 4, "depth": 2}),
    "laeprefix": Reference(blockwise(methods.laeprefix), "gqk/LAE", {"num_virtual_tokens": 3, "depth": 2}, False),
    "last": Reference(side.last, "the paper", {"r": 4}),
    "linearprobe": Reference(methods.linearprobe, "the paper"),
    "lorvp": Reference(at_pixels(methods.low_rank), "the paper", {"r": 2}),
    "lorand": Reference(blockwise(methods.lorand), "DongshuoYin/CoLin: swin_lorand.py", {"r": 8, "rank": 4}, False),
    "lst": Reference(
        side.lst,
        "ylsung/Ladder-Side-Tuning: VL-T5/src/modeling_t5.py",
        {"r": 2, "num_heads": 2, "dropout": 0.1},
        False,
    ),
    "mam": Reference(
        blockwise(methods.mam),
        "the paper",
        {"num_virtual_tokens": 3, "r": 4, "scale": 1.5, "dropout": 0.1},
        False,
    ),
    "mlae": Reference(
        beside_linears(("query", "value"), methods.mlae),
        "jie040109/MLAE: mlae.py",
        {"r": 3, "dropout": 0.1},
    ),
    "mona": Reference(blockwise(methods.mona), "Leiyi-Hu/mona: swin_transformer_mona.py", {"r": 4}, False),
    "mosa": Reference(blockwise(methods.mosa), "Theia-4869/MoSA: vit_mosa.py, pruner.py", {"r": 4}),
    "partial": Reference(methods.partial, "the paper"),
    "patt": Reference(
        beside_linears(("key", "value"), methods.patt),
        "bruceyo/V-PETL: models/video_swin_transformer_patt.py",
        {"r": 4},
        False,
    ),
    "pfeiffer": Reference(blockwise(methods.pfeiffer), "the paper", {"r": 4, "dropout": 0.1}),
    "prefix": Reference(blockwise(methods.prefix), "the paper", {"num_virtual_tokens": 3, "dropout": 0.1}, False),
    "prefix-mlp": Reference(
        blockwise(methods.prefix),
        "jxhe/unify-parameter-efficient-tuning: petl/petl_factory.py, class Prefix",
        {"num_virtual_tokens": 3, "reparam_dim": 5, "dropout": 0.1},
        False,
    ),
    "provp": Reference(
        methods.provp, "MCG-NJU/ProVP", {"num_virtual_tokens": 3, "alpha": 0.25, "dropout": 0.1}, False
    ),
    "repadapter": Reference(methods.repadapter, "luogen1996/RepAdapter: repadapter.py", {"r": 4}),
    "restuning": Reference(side.restuning, "the paper", {"r": 4}, False),
    "rlrr": Reference(methods.rlrr, "zstarN70/RLRR: models/networks.py", identity=False),
    "samparser": Reference(
        beside_linears(ROLES, methods.samparser), "Chongjie-Si/Subspace-Tuning, with changes of singular values"
    ),
    "sct": Reference(
        choices.sct, "showlab/SCT: vision_transformer_sct.py, train_model_sct.py", {"channels": 6}, False, chooses=True
    ),
    "sherl": Reference(side.sherl, "Paranioar/SHERL: VSE-infty/lib/adapter_for_transformer.py", {"r": 5}, False),
    "sharedlora": Reference(beside_linears(ATTENTION, methods.sharedlora), "the paper", {"r": 4}),
    "sidetuning": Reference(side.sidetuning, "the paper", {"channels": 4, "depth": 2}, False),
    "snell": Reference(
        beside_linears(ROLES, methods.snell), "ssfgunner/SNELL: vision_transformer_timm.py", {"sparsity": 0.5}, False
    ),
    "snf": Reference(blockwise(methods.snf), "Wang-Yaoming/SNF: flow.py, snf.py", {"num_flows": 2}, False),
    "sparsetuning": Reference(
        methods.sparsetuning,
        "liuting20/Sparse-Tuning: models/adapter.py, models/vit_image.py",
        {"r": 4, "inner": 2, "groups": 2},
        False,
    ),
    "spt": Reference(
        choices.spt, "ziplab/SPT: engine.py, get_sensitivity", {"budget": choices.BUDGET, "r": 2}, chooses=True
    ),
    "ssf": Reference(methods.ssf, "dongzelian/SSF: models/vision_transformer.py", identity=False),
    "stadapter": Reference(
        blockwise(methods.stadapter),
        "linziyi96/st-adapter: models_adapter.py",
        {"channels": 6, "sublayers": ("attention", "mlp")},
        frames=2,
        early=True,
    ),
    "unipt": Reference(side.unipt, "Paranioar/UniPT: VSE-infty/lib/adapter_for_transformer.py", {"r": 5}, False),
    "vitadapter": Reference(
        side.vitadapter,
        "czczup/ViT-Adapter: adapter_modules.py, with group norms",
        {"channels": 4, "num_points": 2, "interactions": 2, "drop_path": 0.1},
    ),
    "vapt": Reference(
        blockwise(methods.vapt),
        "Minhchuyentoancbn/VAPT: src/models/vit_prompt/vit.py",
        {"num_virtual_tokens": 3, "r": 2, "dropout": 0.0},
        False,
    ),
    "vfpt": Reference(
        blockwise(methods.vfpt),
        "runtsang/VFPT: src/models/vit_prompt/vit_fourier.py",
        {"num_virtual_tokens": 3, "fraction": 0.7, "dropout": 0.1},
        False,
    ),
    "vp": Reference(at_pixels(methods.framed), "the paper", {"width": 3}, False),
    "vp-patch": Reference(
        at_pixels(lambda x, w: x + F.pad(w["patch"], (0, x.shape[-1] - 5, 0, x.shape[-2] - 5))),
        "the paper",
        {"width": 5, "kind": "patch"},
        False,
    ),
    "vpt": Reference(
        blockwise(methods.vpt), "KMnP/vpt: vit_prompt/vit.py", {"num_virtual_tokens": 3, "dropout": 0.1}, False
    ),
    "vpt-shallow": Reference(
        methods.vpt_shallow,
        "KMnP/vpt: vit_prompt/vit.py",
        {"num_virtual_tokens": 3, "deep": False, "projection_dim": 5, "dropout": 0.1},
        False,
    ),
    "vqt": Reference(methods.vqt, "andytu28/VQT: h2t_vit.py", {"num_virtual_tokens": 2}, False),
}
