"""What vLLM's CPU build computes otherwise than transformers, and no longer does in our processes."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

import raykd.engine.cpu_corrections  # noqa: F401

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM for GPUs has other kernels")


@pytest.mark.parametrize("is_neox_style", [False, True])
def test_heads_that_lie_apart_are_rotated_as_those_in_a_row(is_neox_style: bool) -> None:
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(64, 512, is_neox_style, {"rope_type": "default", "rope_theta": 1e4}, dtype=torch.float32)
    query, key, positions = torch.randn(7, 3, 96), torch.randn(7, 1, 64), torch.arange(7)
    parts = query[..., 32:]
    row = rope.forward_cpu(positions, parts.flatten(1), key.flatten(1).clone())
    apart = rope.forward_cpu(positions, parts, key)
    for one, other in zip(row, apart, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other.flatten(1))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_routers_bias_chooses_the_experts_and_leaves_their_weights(scoring: str) -> None:
    logits, bias = torch.randn(50, 6), torch.randn(6)
    router = CPURouter(2, 6, scoring_func=scoring, e_score_correction_bias=bias)
    weights, ids = router._compute_routing(logits, logits, None)
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    expected = (scores + bias).topk(2).indices
    assert torch.equal(ids.sort().values.long(), expected.sort().values)
    chosen = scores.gather(-1, ids.long())
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    assert not torch.equal(expected.sort().values, scores.topk(2).indices.sort().values), "without the bias others are chosen"
