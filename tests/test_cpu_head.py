"""The head of a bfloat16 engine on CPU."""

from types import SimpleNamespace

import pytest
import torch
from rollout_stack import STORIES, STORIES_EOS, engine_config, perturbed, publish, wait
from transformers import AutoModelForCausalLM

from raykd import cpu_products
from raykd.rollout.cpu_head import WideHead, widen_head


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [1, 70])
def test_logits_are_the_float32_product_of_the_weights_of_the_last_update(
    packed: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(cpu_products, "_kernel", lambda: None)
    layer = SimpleNamespace(weight=torch.randn(500, 64).bfloat16())
    hidden, bias = torch.randn(rows, 64).bfloat16(), torch.randn(500).bfloat16()
    head = WideHead()
    for _ in range(2):
        expected = hidden.double() @ layer.weight.double().T
        assert head(layer, hidden, None).dtype == torch.float32
        torch.testing.assert_close(head(layer, hidden, None).double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head(layer, hidden, bias).double(), expected + bias.double(), atol=1e-5, rtol=1e-5)
        layer.weight.mul_(2)
        head.forget()


def test_a_head_that_needs_no_cast_is_left_alone():
    processor = SimpleNamespace(head_dtype=torch.float32)
    assert widen_head(SimpleNamespace(logits_processor=processor), torch.float32) is None
    assert widen_head(SimpleNamespace(), torch.bfloat16) is None
    assert isinstance(widen_head(SimpleNamespace(logits_processor=processor), torch.bfloat16), WideHead)


@pytest.mark.stack
@pytest.mark.usefixtures("data")
def test_a_bfloat16_engine_writes_with_the_head_of_each_update():
    from raykd.rollout.vllm_engine import VllmEngine

    original = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    engine = VllmEngine(STORIES, engine_config(STORIES).model_copy(update={"dtype": "bfloat16"}), (STORIES_EOS,))
    try:
        for version in range(4):  # as loaded, reloaded by vLLM, then in place
            model = perturbed(original, version).bfloat16() if version else original.bfloat16()
            if version:
                wait(engine.load(publish(model, version)))
            written = wait(engine.complete([1], 40, seed=version))
            with torch.no_grad():
                ids = torch.tensor([[1, *written.tokens]])
                states = model.model(ids).last_hidden_state[0, :-1].float()
                logprobs = (states @ model.lm_head.weight.float().T).log_softmax(-1)
            expected = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(written.logprobs), expected, atol=0.25, rtol=0)
            assert (torch.tensor(written.logprobs) - expected).abs().mean() < 0.05
    finally:
        engine.close()
