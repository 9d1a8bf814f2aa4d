"""Kunlunxin's collective library, common to both of its runtimes."""

import os
from typing import Optional


def tree_cannot_span(nodes: int) -> Optional[str]:
    """Why its tree all-reduce cannot work between so many nodes (FlagPerf's GLM case, environment_variables.sh)."""
    tree = os.environ.get("BKCL_SOCKET_FORCE_TREE", "0")
    if nodes == 1 or nodes % 2 == 0 or tree in ("", "0"):
        return None
    return (
        f"BKCL_SOCKET_FORCE_TREE={tree} (conf/hardware/, or your environment): a tree all-reduce needs an even number "
        f"of nodes, not {nodes}; set BKCL_SOCKET_FORCE_TREE=0, or take another number"
    )
