"""Broadcast and all-gather of Python objects as device tensors, the only ones that some backends support.

torch's own object collectives put their bytes into CPU tensors for every backend but nccl.
"""

import pickle
from typing import Any, List

import torch


def broadcast_object(content: Any, device: torch.device, source: int = 0) -> Any:
    """Broadcast the object of rank `source` to every rank."""
    is_source = torch.distributed.get_rank() == source
    # 64-bit integers, a dtype that every collective library supports.
    packed = torch.tensor(list(pickle.dumps(content)) if is_source else [], dtype=torch.long).to(device)
    length = torch.tensor([len(packed)], dtype=torch.long).to(device)
    torch.distributed.broadcast(length, source)
    if not is_source:
        packed = torch.zeros(int(length), dtype=torch.long, device=device)
    torch.distributed.broadcast(packed, source)
    return content if is_source else pickle.loads(bytes(packed.tolist()))  # noqa: S301 (of the ranks of this job)


def all_gather_object(content: Any, device: torch.device) -> List[Any]:
    """Gather the objects of all ranks, in rank order, on every rank."""
    return [broadcast_object(content, device, rank) for rank in range(torch.distributed.get_world_size())]
