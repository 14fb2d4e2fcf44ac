"""What workers of several ranks want of a machine that may have two cores, or one."""

import os


def one_core_each(ranks: int = 2) -> dict[str, str]:
    """The environment in which each rank has one core, shared where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    own = (cores[rank % len(cores)] for rank in range(ranks))
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, own)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
