"""Every divergence against torch.distributions, golden numbers, finite differences and its defining properties."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from raykd.divergences import (
    HEAD_CANDIDATES,
    Boundary,
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jeffreys,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    top_k,
    total_variation,
)

Divergence = Callable[[Tensor, Tensor], Tensor]

EVERY: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd(.1)": lambda q, p: jensen_shannon(q, p, 0.1),
    "jsd(.5)": lambda q, p: jensen_shannon(q, p, 0.5),
    "jsd(.9)": lambda q, p: jensen_shannon(q, p, 0.9),
    "skl(.1)": lambda q, p: skew_forward_kl(q, p, 0.1),
    "srkl(.1)": lambda q, p: skew_reverse_kl(q, p, 0.1),
    "akl": adaptive_kl,
    "akl prefix": lambda q, p: adaptive_kl(q, p, boundary="prefix"),
    "tv": total_variation,
    "jeffreys": jeffreys,
    "ab(.2,.7)": lambda q, p: alpha_beta(q, p, 0.2, 0.7),
    "ab(.5,.5)": lambda q, p: alpha_beta(q, p, 0.5, 0.5),
    "ab(1,1)": lambda q, p: alpha_beta(q, p, 1.0, 1.0),
    "ab(1,0)": lambda q, p: alpha_beta(q, p, 1.0, 0.0),
    "ab(0,1)": lambda q, p: alpha_beta(q, p, 0.0, 1.0),
    "ab(.3,0)": lambda q, p: alpha_beta(q, p, 0.3, 0.0),
}
BOUNDS = {"jsd(.5)": math.log(2), "skl(.1)": -math.log(0.1), "srkl(.1)": -math.log(0.1), "tv": 1.0, "ab(.5,.5)": 4.0}

P, Q = (0.5, 0.3, 0.15, 0.05), (0.2, 0.4, 0.1, 0.3)
GOLDEN: dict[str, tuple[float, tuple[float, ...] | None]] = {
    # GKD, arXiv 2306.13649: values and logit gradients by the formulas of its divergences.
    "forward_kl": (0.343073, (-0.3, 0.1, -0.05, 0.25)),
    "reverse_kl": (0.428796, (-0.269017, -0.056446, -0.083426, 0.408889)),
    "jsd(.1)": (0.030841, (-0.025769, 0.007891, -0.004697, 0.022575)),
    "jsd(.5)": (0.088838, (-0.064049, 0.010531, -0.015201, 0.068718)),
    "jsd(.9)": (0.036302, (-0.023284, -0.002197, -0.006814, 0.032295)),
    # DistiLLM, arXiv 2402.03898.
    "skl(.1)": (0.277819, (-0.222126, 0.061433, -0.043982, 0.204676)),
    "srkl(.1)": (0.309806, (-0.203951, 0.001230, -0.056331, 0.259053)),
    # AKL, arXiv 2404.02657: the top token alone has exactly the head's mass.
    "akl": (0.392057, (-0.282296, 0.010603, -0.069101, 0.340794)),
    "akl prefix": (0.392057, (-0.282296, 0.010603, -0.069101, 0.340794)),
    # ABKD, arXiv 2505.04560; (.5, .5) is four times the squared Hellinger distance 0.092413.
    "ab(.2,.7)": (0.466532, None),
    "ab(.5,.5)": (0.369652, None),
    "ab(1,1)": (0.0825, None),
    "tv": (0.35, (-0.14, 0.12, -0.07, 0.09)),
    "jeffreys": (0.771869, None),
}

LOGITS = st.integers(2, 7).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-12, 12, width=32), min_size=size, max_size=size)] * 2)
)


def log(values: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype).log()


def value_and_gradient(divergence: Divergence, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = divergence(leaf.log_softmax(-1), teacher)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    value, gradient = value_and_gradient(EVERY[name], log(Q, dtype), log(P, dtype))
    expected_value, expected_gradient = GOLDEN[name]
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected_value, abs=1e-6)
    if expected_gradient is not None:
        assert gradient.tolist() == pytest.approx(expected_gradient, abs=1.5e-6)


@pytest.mark.parametrize(
    ("boundary", "value", "gradient"),
    [
        ("prefix", 0.279300, (-0.231236, 0.168101, 0.075056, -0.011921)),
        ("minimal", 0.306551, (-0.277079, 0.189367, 0.091685, -0.003974)),
    ],
)
def test_adaptive_kl_where_the_boundary_rules_differ(boundary: Boundary, value: float, gradient: tuple[float, ...]) -> None:
    """AKL, arXiv 2404.02657, both readings of its head; weights 1/2, 1/2 and 5/6, 1/6."""
    divergence = partial(adaptive_kl, head_mass=0.5, boundary=boundary)
    got_value, got_gradient = value_and_gradient(divergence, log((0.1, 0.5, 0.3, 0.1)), log((0.4, 0.3, 0.2, 0.1)))
    assert got_value.item() == pytest.approx(value, abs=1e-6)
    assert got_gradient.tolist() == pytest.approx(gradient, abs=1e-6)


def test_kl_and_jensen_shannon_equal_torch_distributions() -> None:
    logits_q, logits_p = torch.randn(2, 4, 3, 17, dtype=torch.float64) * 3
    q, p = Categorical(logits=logits_q), Categorical(logits=logits_p)
    mixed = Categorical(probs=0.3 * p.probs + 0.7 * q.probs)
    expected = 0.3 * kl_divergence(p, mixed) + 0.7 * kl_divergence(q, mixed)
    torch.testing.assert_close(forward_kl(q.logits, p.logits), kl_divergence(p, q))
    torch.testing.assert_close(reverse_kl(q.logits, p.logits), kl_divergence(q, p))
    torch.testing.assert_close(jensen_shannon(q.logits, p.logits, 0.3), expected)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_equals_finite_differences(name: str) -> None:
    torch.manual_seed(1)
    logits, teacher = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64).log_softmax(-1)
    if name.startswith("akl"):  # its weights carry no gradient, so finite differences would see more than autograd should
        value, gradient = value_and_gradient(EVERY[name], logits, teacher)
        forward, reverse = (value_and_gradient(d, logits, teacher) for d in (forward_kl, reverse_kl))
        weight = ((value - reverse[0]) / (forward[0] - reverse[0])).unsqueeze(-1)
        torch.testing.assert_close(gradient, weight * forward[1] + (1 - weight) * reverse[1])
        return
    assert torch.autograd.gradcheck(lambda z: EVERY[name](z.log_softmax(-1), teacher), (logits.requires_grad_(),))


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=25, deadline=None)
@given(pair=LOGITS)
def test_zero_at_equality_positive_elsewhere_and_bounded(name: str, pair: tuple[list[float], list[float]]) -> None:
    logits = torch.tensor(pair, dtype=torch.float64)
    q, p = logits.log_softmax(-1)
    same, gradient = value_and_gradient(EVERY[name], logits[1], p)
    assert abs(same.item()) < 1e-12
    assert gradient.abs().max().item() < 1e-12
    value, gradient = value_and_gradient(EVERY[name], q, p)
    assert -1e-12 < value.item() <= BOUNDS.get(name, math.inf) + 1e-12
    assert torch.isfinite(gradient).all()
    if (q.exp() - p.exp()).abs().max() > 1e-5:  # a squared distance cannot show less
        assert value.item() > 1e-12


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=10, deadline=None)
@given(pair=LOGITS, seed=st.integers(0, 1000))
def test_the_order_of_the_vocabulary_does_not_matter(name: str, pair: tuple[list[float], list[float]], seed: int) -> None:
    q, p = torch.tensor(pair, dtype=torch.float64).log_softmax(-1)
    if name.startswith("akl") and len(p.unique()) < len(p):
        return  # which of two equally probable tokens is head is not defined
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(EVERY[name](q[order], p[order]), EVERY[name](q, p), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_float32_is_zero_at_equality_over_a_large_vocabulary(name: str) -> None:
    logits = torch.randn(4, 32000) * 3
    value, gradient = value_and_gradient(EVERY[name], logits, logits.log_softmax(-1))
    assert value.abs().max().item() < 1e-5
    assert gradient.abs().max().item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_halves_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    q, p = (torch.randn(2, 5, 300).log_softmax(-1)).to(dtype)
    value = EVERY[name](q, p)
    assert value.dtype == torch.float32
    assert torch.equal(value, EVERY[name](q.float(), p.float()))


@pytest.mark.parametrize("name", EVERY)
def test_tokens_impossible_to_both_count_for_nothing(name: str) -> None:
    torch.manual_seed(3)
    q, p = torch.randn(2, 4, 5, dtype=torch.float64)
    wide_q, wide_p = (torch.cat([x, x.new_full((4, 3), -math.inf)], -1) for x in (q, p))
    value, gradient = value_and_gradient(EVERY[name], wide_q, wide_p.log_softmax(-1))
    expected_value, expected_gradient = value_and_gradient(EVERY[name], q, p.log_softmax(-1))
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(gradient[:, :5], expected_gradient)
    assert gradient[:, 5:].abs().max().item() == 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("missing", ["student", "teacher"])
def test_gradients_stay_finite_where_one_side_has_no_mass(name: str, missing: str) -> None:
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=torch.float64)
    holed = torch.tensor([0.3, -math.inf, 0.1, 0.2], dtype=torch.float64)
    student, teacher = (holed, logits) if missing == "student" else (logits, holed)
    value, gradient = value_and_gradient(EVERY[name], student, teacher.log_softmax(-1))
    infinite = {"student": ("forward_kl", "ab(1,0)", "ab(.3,0)"), "teacher": ("reverse_kl", "ab(0,1)")}[missing]
    assert value.isinf().item() is (name in (*infinite, "jeffreys", "akl", "akl prefix"))
    assert not value.isnan().item()
    assert torch.isfinite(gradient).all()
    if name in infinite and name.endswith("_kl"):
        assert not gradient.any(), "an infinite value sends no gradient"


@settings(max_examples=25, deadline=None)
@given(pair=LOGITS)
def test_jensen_shannon_symmetries_and_limits(pair: tuple[list[float], list[float]]) -> None:
    q, p = torch.tensor(pair, dtype=torch.float64).log_softmax(-1) * 0.2
    q, p = q.log_softmax(-1), p.log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(q, p, 0.3), jensen_shannon(p, q, 0.7), atol=1e-12, rtol=1e-9)
    skews = 0.3 * skew_forward_kl(q, p, 0.3) + 0.7 * skew_reverse_kl(q, p, 0.7)
    torch.testing.assert_close(jensen_shannon(q, p, 0.3), skews, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(jensen_shannon(q, p, 1e-5) / 1e-5, forward_kl(q, p), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(jensen_shannon(q, p, 1 - 1e-5) / 1e-5, reverse_kl(q, p), atol=1e-3, rtol=1e-2)


def test_jensen_shannon_golden_limits() -> None:
    """GKD, arXiv 2306.13649, on the golden pair: the magnitude shrinks with beta, the direction tends to the KL's."""
    assert jensen_shannon(log(Q), log(P), 0.001).item() / 0.001 == pytest.approx(0.342718, abs=1e-6)
    assert jensen_shannon(log(Q), log(P), 0.999).item() / 0.001 == pytest.approx(0.428057, abs=1e-6)
    assert jensen_shannon(log(Q), log(P), 0.3).item() == pytest.approx(0.072670, abs=1e-6)


def test_skews_at_their_ends() -> None:
    q, p = torch.randn(2, 6, 9, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(skew_forward_kl(q, p, 0.0), forward_kl(q, p))
    torch.testing.assert_close(skew_reverse_kl(q, p, 0.0), reverse_kl(q, p))
    assert skew_forward_kl(q, p, 1.0).abs().max().item() == 0
    assert skew_reverse_kl(q, p, 1.0).abs().max().item() == 0


def test_alpha_beta_special_cases() -> None:
    q, p = torch.randn(2, 6, 9, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(alpha_beta(q, p, 1.0, 0.0), forward_kl(q, p))
    torch.testing.assert_close(alpha_beta(q, p, 0.0, 1.0), reverse_kl(q, p))
    torch.testing.assert_close(alpha_beta(q, p, 0.5, 0.5), 2 * ((p / 2).exp() - (q / 2).exp()).square().sum(-1))
    torch.testing.assert_close(alpha_beta(q, p, 1.0, 1.0), (p.exp() - q.exp()).square().sum(-1) / 2)
    for power in (0.3, 1.7):  # the limit has the SQUARE of the parameter below it
        torch.testing.assert_close(alpha_beta(q, p, power, 0.0), alpha_beta(q, p, power, 1e-6), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alpha_beta(q, p, 0.0, power), alpha_beta(q, p, 1e-6, power), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.5, 0.0), (0.3, 0.9)])
def test_gradients_of_alpha_beta_of_anything(alpha: float, beta: float) -> None:
    """Of numbers that need not sum to 1: behind a softmax a constant in the gradient would not show."""
    q, p = torch.randn(2, 3, 5, dtype=torch.float64).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda q: alpha_beta(q, p, alpha, beta), q.requires_grad_())


@pytest.mark.parametrize("scale", [0.01, 3.0, "one of each"])
@pytest.mark.parametrize("boundary", ["minimal", "prefix"])
def test_adaptive_kl_needs_the_whole_sort_only_where_the_teacher_is_flat(scale: float | str, boundary: Boundary) -> None:
    """A head of more tokens than are looked at first, beside a plain sort of everything."""
    torch.manual_seed(5)
    scales = (
        torch.full((7, 1), scale, dtype=torch.float64)
        if isinstance(scale, float)
        else torch.tensor([[0.01], [9.0]] * 3 + [[9.0]])
    )
    q, p = (torch.randn(2, 7, 5 * HEAD_CANDIDATES, dtype=torch.float64) * scales).log_softmax(-1)
    mass, order = p.exp().sort(-1, descending=True)
    up_to = mass.cumsum(-1)
    head = up_to - mass < 0.5 if boundary == "minimal" else up_to <= 0.5
    head[:, 0] = True
    gaps = (p.exp() - q.exp()).abs().gather(-1, order)
    weight = (gaps * head).sum(-1) / gaps.sum(-1)
    expected = weight * forward_kl(q, p) + (1 - weight) * reverse_kl(q, p)
    torch.testing.assert_close(adaptive_kl(q, p, 0.5, boundary), expected)
    assert ((head.sum(-1) > HEAD_CANDIDATES) == (scales[:, 0] == 0.01)).all()


@settings(max_examples=25, deadline=None)
@given(pair=LOGITS, head_mass=st.floats(0.05, 0.95))
def test_adaptive_kl_lies_between_the_two(pair: tuple[list[float], list[float]], head_mass: float) -> None:
    q, p = torch.tensor(pair, dtype=torch.float64).log_softmax(-1)
    low, high = sorted([forward_kl(q, p).item(), reverse_kl(q, p).item()])
    assert low - 1e-12 <= adaptive_kl(q, p, head_mass).item() <= high + 1e-12


def test_what_cannot_be_meant_is_refused() -> None:
    q, p = torch.randn(2, 3, 5).log_softmax(-1)
    with pytest.raises(ValueError, match="use forward_kl or reverse_kl"):
        jensen_shannon(q, p, 0.0)
    with pytest.raises(ValueError, match="alpha"):
        skew_forward_kl(q, p, 1.1)
    with pytest.raises(ValueError, match="alpha"):
        skew_reverse_kl(q, p, -0.1)
    with pytest.raises(ValueError, match="boundary"):
        adaptive_kl(q, p, boundary="largest")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="non-negative"):
        alpha_beta(q, p, -0.5, 1.0)
    with pytest.raises(ValueError, match="cut both vocabularies"):
        forward_kl(q, p[:, :4])


@settings(max_examples=50, deadline=None)
@given(LOGITS, st.integers(1, 8))
def test_top_k_with_its_tail_is_a_lower_bound(pair: tuple[list[float], list[float]], k: int) -> None:
    student, teacher = torch.tensor(pair, dtype=torch.float64).log_softmax(-1)
    for divergence in (forward_kl, reverse_kl):
        seen = divergence(*top_k(student, teacher, k))
        assert (seen >= -1e-9).all()
        assert (seen <= divergence(student, teacher) + 1e-9).all()


def test_top_k_by_hand() -> None:
    """p = (.5, .3, .15, .05), q = (.2, .4, .1, .3): on two tokens and the rest (.5, .3, .2) against (.2, .4, .4)."""
    student, teacher = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.2, 0.4, 0.1, 0.3), (0.5, 0.3, 0.15, 0.05)))
    seen_student, seen_teacher = top_k(student, teacher, 2)
    torch.testing.assert_close(seen_student.exp(), torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64))
    torch.testing.assert_close(seen_teacher.exp(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    renormalised = top_k(student, teacher, 2, tail=False)
    torch.testing.assert_close(renormalised[0].exp(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert all(a is b for a, b in zip(top_k(student, teacher, 4), (student, teacher), strict=True))
    with pytest.raises(ValueError, match="k must be"):
        top_k(student, teacher, 0)


def test_the_gradient_of_top_k_is_finite_where_nothing_is_left_outside() -> None:
    logits = torch.tensor([1.0, 2.0, -torch.inf, -torch.inf], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    forward_kl(*top_k(logits.log_softmax(-1), teacher, 2)).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:2], logits.detach()[:2].softmax(-1) - 0.5)


@pytest.mark.parametrize("divergence", [skew_forward_kl, skew_reverse_kl])
def test_one_skew_a_token_equals_token_by_token(divergence: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    alphas = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64)
    expected = torch.stack([divergence(student[i], teacher[i], float(alphas[i])) for i in range(3)])
    torch.testing.assert_close(divergence(student, teacher, alphas), expected)
