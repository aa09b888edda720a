"""Threads in the place of processes, for code that shares its work through an `all_gather`."""

import threading
from collections.abc import Callable

import torch


# In seconds: a process that takes part in fewer gathers than the others would let them wait for ever.
PATIENCE = 30


def in_processes(num_processes: int, work: Callable) -> list:
    """
    Returns what `work(process_index, gather)` gives for each of several processes, which run at the same time. `gather`
    concatenates everyone's tensor, as `Accelerator.gather` does; where one process raises, the others end too.
    """
    barrier, given = threading.Barrier(num_processes, timeout=PATIENCE), [None] * num_processes
    results, errors = [None] * num_processes, []

    def run(rank: int) -> None:
        def gather(tensor: torch.Tensor) -> torch.Tensor:
            assert tensor.is_contiguous() and tensor.ndim > 0
            given[rank] = tensor.clone()
            barrier.wait()
            assert len({(other.shape, other.dtype) for other in given}) == 1, (
                "an all_gather takes tensors of one shape"
            )
            everyones = torch.cat(given)
            barrier.wait()
            return everyones

        try:
            results[rank] = work(rank, gather)
        # Raised again below, in the thread of the test.
        except BaseException as error:  # noqa: BLE001
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The others only say that they waited in vain.
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return results
