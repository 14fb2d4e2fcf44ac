"""Which passes the warm-up meets, before a prompt would wait for their kernels."""

import pytest
import torch

from vllm_dca.engine import warmup
from vllm_dca.method.geometry import ChunkGeometry
from vllm_dca.method.planning import plan_prefill


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_passes_of_few_queries_and_of_many_are_met(group: int) -> None:
    """What flash-attention 4 is compiled for, causally and not."""
    chunk_len, page = warmup.CHUNK_LEN, 16
    met = set()
    for new, length in warmup.prompts(chunk_len, group, has_sinks=False):
        table = torch.zeros(1, -(-length // page), dtype=torch.int32)
        plan = plan_prefill([0, new], [length], table, page, ChunkGeometry(chunk_len + 1, 1))
        for each in plan.passes:
            queries = each.max_seqlen_q * group
            met.add((each.causal, sum(queries > most for most in warmup.QUERIES)))
    assert met == {(causal, few) for causal in (True, False) for few in (0, 1, 2)}
