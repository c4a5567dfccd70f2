"""What only a GPU does: the chunked loss in its sizes and dtypes there. Where there is one, the tests of learner, teacher,
packing and rollout engine run on it by themselves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_packing import PACKABLE, PROMPTS, RESPONSES, make_model
from test_projection import ALGORITHMS, Case, gradients, named
from torch import Tensor

from raykd.algorithms import GKD, Algorithm, MiniLLM
from raykd.algorithms.token_divergences import JSD, ReverseKL
from raykd.divergences import reverse_kl
from raykd.fused import fuse
from raykd.gpu_products import Sum, scale_
from raykd.head import Head
from raykd.packing import Ragged, packed, packed_attention
from raykd.projection import SIZES, teacher_probe, weighted_loss

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


class OnGPU(Case):
    """The same numbers in the GPU's memory."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for name, value in vars(self).items():
            setattr(self, name, moved(value))


def moved(value: Any) -> Any:
    if isinstance(value, Head):
        return replace(value, weight=moved(value.weight), bias=moved(value.bias))
    if isinstance(value, dict):
        return {name: moved(item) for name, item in value.items()}
    return value if value is None else value.detach().cuda().requires_grad_(value.requires_grad)


def gpu_model(dtype: torch.dtype) -> Any:
    """The same in every call."""
    model: Any = make_model("llama", PACKABLE["llama"])
    return model.to("cuda", dtype).train()


@pytest.fixture(params=[1, 2, 1000], ids=lambda positions: f"chunks of {positions}")
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of a chunk, whose products are summed."""
    monkeypatch.setitem(SIZES, "cuda", replace(SIZES["cuda"], chunk=1, positions=request.param))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_loss_and_gradient_are_the_cpus(algorithm: Algorithm, dtype: torch.dtype, tolerance: float) -> None:
    here, there = Case(dtype=torch.float64), OnGPU(dtype=dtype)
    expected, sums = here.dense(algorithm)
    found, found_sums = there.chunked(algorithm)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=tolerance, abs=tolerance)
    assert {name: float(value) for name, value in found_sums.items()} == pytest.approx(
        {name: float(value) for name, value in sums.items()}, rel=10 * tolerance, abs=10 * tolerance
    )
    for got, wanted in zip(gradients(found, there), gradients(expected, here), strict=True):
        torch.testing.assert_close(got.cpu().double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("algorithm", [GKD(divergence=ReverseKL()), GKD(divergence=JSD()), MiniLLM()], ids=named)
def test_compiled_it_is_the_same(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "cuda", replace(SIZES["cuda"], chunk=1, positions=4))
    case = OnGPU(dtype=torch.float32)
    expected, found = (case.chunked(algorithm, compiled=compiled)[0] for compiled in (False, True))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for got, wanted in zip(gradients(found, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("vocab_size", [1024, 1003], ids=["even", "odd"])
def test_in_bfloat16_only_the_slope_is_rounded(vocab_size: int, compiled: bool) -> None:
    """Logits and sums are float32; against float32 arithmetic on the same numbers."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    tokens, width = 1500, 64  # more than one chunk
    hidden, weight = normal(tokens, width).requires_grad_(), (normal(vocab_size + 5, width) / 4).requires_grad_()
    states, teacher = normal(tokens, 96), Head(weight=normal(vocab_size + 5, 96) / 4)
    chosen = torch.randint(vocab_size, (tokens,), device="cuda")
    found, _ = weighted_loss(
        Head(weight=weight),
        hidden,
        chosen,
        torch.full((tokens,), 1 / tokens, device="cuda"),
        GKD(divergence=ReverseKL()).per_token,
        vocab_size=vocab_size,
        teacher_states=states,
        teacher_head=teacher,
        probe=teacher_probe(states, teacher, chosen, vocab_size),
        chunk=512,
        compiled=compiled,
    )
    got = torch.autograd.grad(found, (hidden, weight))
    wide = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    student = (wide[0] @ wide[1][:vocab_size].T).log_softmax(-1)
    expected = reverse_kl(student, (states.double() @ teacher.weight[:vocab_size].double().T).log_softmax(-1)).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for gradient, wanted in zip(got, torch.autograd.grad(expected, wide), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert float((gradient.double() - wanted).norm() / wanted.norm()) < 5e-3
    assert not got[1][vocab_size:].any()


@pytest.mark.parametrize("counts", [(50, 64, 512), (64,) * 40 + (7,)], ids=["three", "many"])
def test_a_sum_in_three_bytes_is_rounded_once(counts: tuple[int, ...]) -> None:
    """Against float64: as far off as its rounding to bfloat16, which a sum in bfloat16 exceeds."""
    rows, width = 1088, 464  # neither is a multiple of the kernel's blocks
    total = torch.full((rows, width), torch.nan, device="cuda", dtype=torch.bfloat16)
    found, exact = Sum(total), torch.zeros(rows, width, device="cuda", dtype=torch.float64)
    rounded = torch.zeros_like(total)
    for index, count in enumerate(counts):
        first, second = (torch.randn(count, size, device="cuda").bfloat16() for size in (rows, width))
        found.add(first, second, begins=index == 0, ends=index == len(counts) - 1)
        product = first.double().T @ second.double()
        exact += product
        rounded += product.bfloat16()

    def off(value: Tensor) -> float:
        return float((value.double() - exact).norm() / exact.norm())

    assert off(total) < 1.01 * off(exact.bfloat16()) < 0.8 * off(rounded)


def test_a_sum_in_three_bytes_keeps_what_is_not_finite() -> None:
    total = torch.empty(64, 16, device="cuda", dtype=torch.bfloat16)
    found, first = Sum(total), torch.ones(8, 64, device="cuda", dtype=torch.bfloat16)
    second = torch.ones(8, 16, device="cuda", dtype=torch.bfloat16)
    bad = second.clone()
    bad[0, 0], bad[0, 1] = torch.nan, torch.inf
    for index, states in enumerate((second, bad, second)):
        found.add(first, states, begins=index == 0, ends=index == 2)
    assert total[:, 0].isnan().all() and total[:, 1].isinf().all() and (total[:, 2:] == 24).all()


def test_a_sum_of_nothing_is_zero() -> None:
    total = torch.full((64, 16), torch.nan, device="cuda", dtype=torch.bfloat16)
    first, second = (torch.empty(0, width, device="cuda", dtype=torch.bfloat16) for width in total.shape)
    Sum(total).add(first, second, begins=True, ends=True)
    assert not total.any()


def test_sums_in_three_bytes_take_their_own_kind_of_matrix() -> None:
    for total in (torch.empty(8, 16, device="cuda"), torch.empty(8, 12, device="cuda", dtype=torch.bfloat16)):
        with pytest.raises(NotImplementedError, match="in three bytes"):
            Sum(total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.37, float("nan")])
def test_scaling_in_place(dtype: torch.dtype, factor: float) -> None:
    values = torch.randn(3, 7777, device="cuda", dtype=dtype)
    upstream = torch.tensor(factor, device="cuda", dtype=torch.promote_types(dtype, torch.float32))
    expected = (values.to(upstream.dtype) * upstream).to(dtype)
    scale_(values, upstream)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("texts", [(PROMPTS, RESPONSES), (PROMPTS[1:3], RESPONSES[1:3])], ids=["shared prompts", "none shared"])
def test_texts_are_attended_in_one_call(texts: Any, key_heads: int) -> None:
    """In bfloat16, with its gradients, as text by text in float32."""
    segments = packed(texts[0], texts[1]).segments
    assert segments is not None
    size = segments[-1].own.stop
    heads = [torch.randn(1, count, size, 64, device="cuda").bfloat16() for count in (4, key_heads, key_heads)]
    ragged = Ragged.of(segments, torch.device("cuda"))
    results = []
    for dtype, given in ((torch.bfloat16, ragged), (torch.float32, None)):
        inputs = query, key, value = [values.to(dtype).requires_grad_() for values in heads]
        found, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling=0.2, segments=segments, ragged=given)
        results.append([found, *torch.autograd.grad((found * torch.linspace(-1, 1, 64, device="cuda")).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_kernels_give_the_same_states_and_gradients_and_leave_other_models_alone(dtype: torch.dtype) -> None:
    plain, fused = (gpu_model(dtype) for _ in range(2))
    assert fuse(fused)
    ids = torch.randint(61, (2, 17), device="cuda")
    results = []
    for model in (plain, fused):
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weights = torch.linspace(-1, 1, states.shape[-1], device="cuda", dtype=dtype)
        results.append([states, *torch.autograd.grad((states * weights).sum(), list(model.base_model.parameters()))])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(*results, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < tolerance
    make_model("llama", PACKABLE["llama"])(input_ids=ids.cpu())
