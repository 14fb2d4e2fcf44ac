"""What a step is planned from."""

import types
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.utils import select_common_block_size

from tests.helpers import checkpoints
from tests.helpers.inprocess import settle
from vllm_dca.engine import backend
from vllm_dca.engine.metadata import DcaMetadataBuilder, host_lengths

pytestmark = pytest.mark.each_minor


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("verifies", [False, True])
def test_lengths_on_the_host_are_exact_of_what_is_planned_as_prefill(
    more: int, drafts: int, verifies: bool
) -> None:
    """Model Runner V1 may put a request whose drafts are verified behind a prefill."""
    true = torch.tensor([7, 900, 500], dtype=torch.int32)
    accepted = true + torch.tensor([3, 0, 2], dtype=torch.int32) * (drafts > 0)
    common = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 501, 505], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1, 501, 505], dtype=torch.int32),
        seq_lens=true + more,
        num_reqs=3,
        num_actual_tokens=505,
        max_query_len=500,
        max_seq_len=903,
        block_table_tensor=torch.zeros(3, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(505, dtype=torch.int64),
        seq_lens_cpu_upper_bound=accepted,
        is_prefilling=torch.tensor([False, True, not verifies]),
    )
    if not verifies:
        accepted[2] = true[2]  # vLLM's are exact for prefills
    lengths = host_lengths(common, slice(1, 3), more, may_verify_late=drafts > 0)
    assert lengths.tolist()[1:] == (true + more).tolist()[1:]


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_no_length_is_fetched_from_a_device_for_prefills(runner: str) -> None:
    common = types.SimpleNamespace(
        seq_lens=None,
        seq_lens_cpu_upper_bound=torch.tensor([10, 20]),
        # V2 says this of all that a draft model reads.
        is_prefilling=torch.tensor([False, runner == "V1"]),
    )
    lengths = host_lengths(common, slice(1, 2), 0, may_verify_late=runner == "V1")
    assert lengths.tolist() == [10, 20]


@pytest.mark.parametrize(
    ("chunk_len", "page", "part"),
    [(5120, 256, 256), (5120, 1056, 32), (20480, 400, 80), (163840, 544, 32), (5120, 8, None)],
)
def test_a_gpu_s_pages_are_split_until_they_divide_a_chunk(
    chunk_len: int, page: int, part: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For linear-attention layers vLLM raises the size of a page after the start-up checks."""
    geometry = types.SimpleNamespace(chunk_len=chunk_len)
    monkeypatch.setattr(
        backend, "settings_of", lambda _: types.SimpleNamespace(geometry=geometry)
    )
    monkeypatch.setattr(backend.current_platform, "is_cpu", lambda: False)
    spec = FullAttentionSpec(page, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    with set_current_vllm_config(VllmConfig()):
        if part is None:
            with pytest.raises(ValueError, match="No common block size for 8"):
                select_common_block_size(page, [backend.DcaBackend], [spec])
            return
        assert select_common_block_size(page, [backend.DcaBackend], [spec]) == part
        # The metadata builders are told the part's size, and ask again.
        assert select_common_block_size(part, [backend.DcaBackend], [spec]) == part


@pytest.mark.parametrize(
    ("prefix", "batched", "captured", "rows"),
    [
        ("model", 16, None, 8 * 4),  # a token and three drafts of each request
        ("draft_model", 16, None, 8 * 5),  # which reads one more
        ("draft_model", 100, None, 100 + 8),
        ("model", 100, None, 100),
        ("model", 16, 64, 64),  # a graph's padding
    ],
)
def test_the_largest_step_fits_its_decode_plan(
    prefix: str, batched: int, captured: int | None, rows: int, llama: Path
) -> None:
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 3}
    config = settle(
        llama,
        max_num_seqs=8,
        max_num_batched_tokens=batched,
        speculative_config=draft,
        additional_config={"dca": checkpoints.SIZES},
    )
    config.compilation_config.max_cudagraph_capture_size = captured
    device = types.SimpleNamespace(
        prefill=None,
        provider=None,
        decode_rows=lambda group: 1,
        decode_planner=lambda settings, block_size, max_rows, group: max_rows,
    )
    prepared = types.SimpleNamespace(device=device)
    impl = types.SimpleNamespace(num_heads=4, num_kv_heads=2, sparse=None, prepared=prepared)
    name = f"{prefix}.layers.0.attn"
    layer = types.SimpleNamespace(impl=impl)
    config.compilation_config.static_forward_context[name] = layer
    spec = FullAttentionSpec(16, num_kv_heads=2, head_size=16, dtype=torch.float32)
    builder = DcaMetadataBuilder(spec, [name], config, torch.device("cpu"))
    assert builder.plan_decode == rows
