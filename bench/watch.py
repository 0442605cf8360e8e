"""Ranks look after each other: one that does nothing any more ends all, a stop of one stops all."""
import json
import os
import threading
import time

import torch.distributed as dist

import common
from bench import early, machine


class Watch:
    """A thread that sees which rank was asked to stop, and which does nothing any more.

    Ranks tell each other through the launcher's store how many meetings and steps they have begun
    and whether they were asked to stop. After `minutes` without progress all of them end.
    """

    PAUSE = 1.0         # seconds between two looks

    def __init__(self, folder: str, rank: int, world: int, minutes: float):
        self.rank, self.world, self.minutes = rank, world, minutes
        self.is_done, self.left = False, threading.Event()
        self.told = []                          # of each rank: [progress, is to stop, is done]
        self.seen = {}                          # rank -> (what it told, when that was new)
        self.store = None
        if dist.is_initialized():
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.prefix = f"watch/{again}/{folder}"
            # A connection of its own: the other one may be waiting.
            self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                       is_master=False, wait_for_workers=False)
            self._tell()
            common.wait_for_all_ranks()
            threading.Thread(target=self._run, daemon=True).start()
        early.begun = True                      # from now on a stop saves

    def _tell(self) -> None:
        told = [common.progress, common.stop.asked, int(self.is_done)]
        self.store.set(f"{self.prefix}/{self.rank}", json.dumps(told))

    def _run(self) -> None:
        while not self.left.wait(self.PAUSE):
            try:
                self._tell()
                keys = [f"{self.prefix}/{rank}" for rank in range(self.world)]
                self.told = [json.loads(self.store.get(key)) for key in keys]
            except Exception:                   # the store is gone, and so is who held it
                common.stop.asked = 1
                self.store = None
                return
            if any(asked for _, asked, _ in self.told):
                common.stop.asked = 1
            self._check()

    def _check(self) -> None:
        """End this process where a rank has been silent for too long."""
        now, late = time.monotonic(), {}        # rank -> its progress
        for rank, its in enumerate(self.told):
            if self.seen.get(rank, [None])[0] != its:
                self.seen[rank] = its, now
            if now - self.seen[rank][1] > 60 * self.minutes and not its[2]:
                late[rank] = its[0]
        # Those that wait for it in a meeting have begun one more than it has.
        silent = [rank for rank, progress in late.items() if progress == min(late.values())]
        if not silent:
            return
        others = [rank for rank in range(self.world) if rank not in silent]
        if self.rank == min(others, default=0):
            names = ", ".join(map(str, silent))
            os.write(2, f"\nerror: rank {names} of {self.world} did nothing for {self.minutes:g} "
                        f"minutes (--timeout); {machine.again()} to go on\n".encode())
        os._exit(1)

    def wait_for_all(self) -> None:
        """Until every rank has come here, however long that takes, or one was asked to stop."""
        self.is_done = True
        while self.store is not None and not common.stop.asked:
            if self.told and all(is_done for _, _, is_done in self.told):
                break
            time.sleep(self.PAUSE / 2)

    def end(self) -> None:
        self.left.set()
        early.begun = False
