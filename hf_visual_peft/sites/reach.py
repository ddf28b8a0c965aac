"""The modules that sites of a block change by more than hooks, so that a copy would lack the change."""

from __future__ import annotations

from collections.abc import Sequence

from ..backbones.backbone import SUBLAYER_ROLES, Block
from .attention import KeyValueSite, LogitSite
from .block_sites import BranchSite, TokenSite
from .layer import Site
from .side import SideSite
from .weights import BlockWeightSite


def reaches_into(sites: Sequence[Site], block: Block, prompts: str | None, path: str) -> bool:
    """Whether sites of a block change one of its modules by more than hooks.

    Args:
        sites: that adapters have at the block.
        block: the block.
        prompts: how prompts join its attention, from the architecture's table.
        path: full name of the module.
    """
    norm, query, *_ = ((*block.roles[role], "")[0] for role in SUBLAYER_ROLES["attention"])
    tokens = any(isinstance(site, TokenSite) for site in sites)
    asks = any(isinstance(site, SideSite) and site.asks for site in sites)
    changes = any(isinstance(s, LogitSite | KeyValueSite) or (isinstance(s, BranchSite) and s.attends) for s in sites)
    reached = list(block.roles["position_bias"]) if tokens or asks else []
    if changes or asks or (tokens and prompts == "keys"):
        reached.append(query.rpartition(".")[0])
    if any(isinstance(site, BlockWeightSite) for site in sites):
        reached.append(block.path)
    around = norm.startswith(f"{path}.")  # which is called by itself, too
    return around or any(f"{path}.".startswith(f"{p}.") or p.startswith(f"{path}.") for p in reached)
