"""What a run does between its steps, told to the watchdog and to the user: none of it is long silence."""

from __future__ import annotations

import time

import torch.distributed as dist

from ds_lvxattn.training.watchdog import Watchdog


def begin(watchdog: Watchdog, phase: str) -> None:
    """This rank begins something that may take long; the first rank says so, with the time of day."""
    watchdog.enter(phase)
    if dist.get_rank() == 0:
        print(f"{time.strftime('%H:%M:%S')}  {phase}", flush=True)
