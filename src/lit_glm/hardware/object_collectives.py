"""Objects from rank to rank as tensors on the chip: a vendor's collectives may take no others.

torch's own object collectives put their bytes into CPU tensors for every backend but nccl.
"""

import pickle
from typing import Any, List

import torch
from torch import Tensor


def _pickle_to_tensor(content: Any, device: torch.device) -> Tensor:
    """[n] bytes as 64-bit numbers: every collective library has these."""
    return torch.tensor(list(pickle.dumps(content)), dtype=torch.long).to(device)


def _unpickle_tensor(numbers: Tensor) -> Any:
    return pickle.loads(bytes(numbers.tolist()))  # noqa: S301 (from the other ranks of this very job)


def broadcast_object(content: Any, device: torch.device, source: int = 0) -> Any:
    """What the rank `source` holds, on every rank."""
    own = torch.distributed.get_rank() == source
    packed = _pickle_to_tensor(content, device) if own else torch.zeros(0, dtype=torch.long, device=device)
    length = torch.tensor([len(packed)], dtype=torch.long).to(device)
    torch.distributed.broadcast(length, source)
    if not own:
        packed = torch.zeros(int(length), dtype=torch.long, device=device)
    torch.distributed.broadcast(packed, source)
    return content if own else _unpickle_tensor(packed)


def all_gather_object(content: Any, device: torch.device) -> List[Any]:
    """What each rank holds, in the order of the ranks, on every rank."""
    return [broadcast_object(content, device, rank) for rank in range(torch.distributed.get_world_size())]
