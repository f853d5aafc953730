"""How many processes train side by side, for what must be the same on all of them."""

from __future__ import annotations

import torch.distributed as dist


def workers() -> int:
    """How many there are; 1 where training is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
