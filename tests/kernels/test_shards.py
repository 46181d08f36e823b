"""Image keys sharded over two processes: each knows a part of the log-sum-exp, all of them the whole map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seg4diff.kernels.api import attention_maps, key_average
from seg4diff.kernels.testing import assert_accurate, attention_inputs, exact_maps, pytorch_maps

TOKENS = 50
BIAS = torch.tensor([[0.0, -torch.inf, 1.0, 0.5, -torch.inf, 0.0, 0.0]])


def process(rank: int, folder: Path) -> None:
    """Holds all queries and the text, and its half of the image keys."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        inputs = attention_inputs(1, TOKENS, 7, 3, 16, torch.float32)
        query, text_key = inputs["query"], inputs["text_key"]
        shard = inputs["key"][:, :20] if rank == 0 else inputs["key"][:, 20:]
        of_shard = key_average(query, shard)[1].contiguous()
        parts = [torch.empty_like(of_shard) for _ in range(2)]
        dist.all_gather(parts, of_shard)
        of_text = attention_maps(query, None, None, text_key, text_bias=BIAS).lse
        assert of_text is not None
        lse = torch.stack([*parts, of_text]).logsumexp(0)
        maps = attention_maps(query, None, None, text_key, text_bias=BIAS, lse=lse).maps
        torch.save(maps, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_make_the_whole_map(tmp_path: Path) -> None:
    mp.spawn(process, (tmp_path,), nprocs=2)
    inputs = attention_inputs(1, TOKENS, 7, 3, 16, torch.float32)
    streams = {n: t for n, t in inputs.items() if not n.endswith("value")}
    exact, usual = exact_maps(**streams, text_bias=BIAS).maps, pytorch_maps(**streams, text_bias=BIAS)
    every = torch.cat([streams["key"], streams["text_key"]], dim=1)
    scores = 0.25 * torch.einsum("bqhd,bkhd->bhqk", streams["query"], every)
    scores[..., TOKENS:] += BIAS
    by_lse = (scores[..., TOKENS:] - scores.logsumexp(-1, keepdim=True)).exp().mean(1)
    torch.testing.assert_close(by_lse, usual.maps)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(*found)
    assert_accurate(found[0], exact, by_lse)
