"""Where a task's images are kept while it is trained: what fits where, by a stated share of the memory that is free."""

import os

import psutil
import torch


# Images are kept in the memory of a device if they take at most this share of what is free there.
SHARE_OF_FREE_MEMORY = 0.25


def free_memory(device: torch.device | str) -> int:
    """Returns the free bytes of a GPU, or this process's share of those of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def place_for(num_bytes: int, device: torch.device | str) -> torch.device | None:
    """Returns the device if so many bytes fit there, else the CPU if they fit there, else `None`."""
    for place in dict.fromkeys((torch.device(device), torch.device("cpu"))):
        if num_bytes <= SHARE_OF_FREE_MEMORY * free_memory(place):
            return place
    return None
