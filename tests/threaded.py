"""Process groups whose processes are threads: collectives tested without starting anything."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.testing._internal.distributed import multi_threaded_pg

__all__ = ["in_threads"]


def in_threads(work: Callable[[int], Any], world: int = 3, limit: float = 20.0) -> list[Any]:
    """What each process ends with: what ``work`` returns for its rank, or the exception that it
    raises.

    Raises:
        TimeoutError: If one waits for the others beyond the limit, in seconds.
    """
    ended: list[Any] = [None] * world
    store = distributed.HashStore()

    def one(rank: int) -> None:
        distributed.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            ended[rank] = work(rank)
        except Exception as error:  # noqa: BLE001  # is looked at
            ended[rank] = error
        distributed.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # noqa: FBT003
    multi_threaded_pg._install_threaded_pg()
    try:
        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(limit)
        if any(thread.is_alive() for thread in threads):
            raise TimeoutError(str(ended))
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)  # noqa: FBT003
    return ended
