"""The chunked loss beside dense autograd, and the integrity check of teacher scores."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raykd import projection
from raykd.algorithms import AKL, GKD, KD, OPD, SFT, Algorithm, DistiLLM, DistiLLM2, MiniLLM, SeqKD
from raykd.algorithms.token_divergences import AnyDivergence
from raykd.divergences import reverse_kl
from raykd.head import COLUMNS, Head
from raykd.payloads import Probe
from raykd.projection import SIZES, teacher_probe, weighted_loss

N, H_STUDENT, H_TEACHER, V, PADDED = 11, 6, 8, 13, 16
DIVERGENCES = [kind() for kind in get_args(get_args(AnyDivergence)[0])]
OTHERS: list[Algorithm] = [
    SFT(),
    SeqKD(),
    KD(data_weight=0.5),
    GKD(reward_weight=0.3),
    DistiLLM(),
    AKL(),
    AKL(boundary="prefix"),
    DistiLLM2(),
    DistiLLM2.code(),
    MiniLLM(),
    MiniLLM.paper(),
    MiniLLM(single_step=False),
    OPD(),
]
ALGORITHMS = [*(GKD(divergence=divergence) for divergence in DIVERGENCES), *OTHERS]


def named(algorithm: Algorithm) -> str:
    divergence = getattr(algorithm, "divergence", None)
    return type(algorithm).__name__ if divergence is None else f"{type(algorithm).__name__}-{divergence.kind}"


class Case:
    """N positions of a student and a teacher whose heads have a bias, a scale, a soft-cap and rows beyond the vocabulary."""

    def __init__(self, num_rows: int = N, dtype: torch.dtype = torch.float64, *, plain: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        extras: dict[str, Any] = {} if plain else {"bias": normal(PADDED).requires_grad_(), "scale": 0.7, "softcap": 5.0}
        self.head = Head(weight=normal(PADDED, H_STUDENT).requires_grad_(), **extras)
        self.hidden = normal(num_rows, H_STUDENT).requires_grad_()
        self.teacher_head = Head(weight=normal(PADDED, H_TEACHER), bias=normal(PADDED), scale=0.7, softcap=5.0)
        self.teacher_hidden = normal(num_rows, H_TEACHER)
        self.tokens = torch.randint(V, (num_rows,), generator=generator)
        self.weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        names = ("advantage", "behaviour", "sampled_reverse_kl", "teacher_logprob")
        by_student = torch.arange(num_rows) % 2
        self.given = {name: normal(num_rows) for name in names} | {
            "alpha": torch.rand(num_rows, generator=generator, dtype=torch.float64).to(dtype),
            "weight": normal(num_rows).abs(),
            "by_student": by_student.to(dtype),
        }

    @property
    def learned(self) -> list[Tensor]:
        return [value for value in (self.hidden, self.head.weight, self.head.bias) if value is not None]

    def chunked(self, algorithm: Algorithm, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
        teacher: dict[str, Any] = {"teacher_states": self.teacher_hidden, "teacher_head": self.teacher_head}
        arguments = (teacher if algorithm.needs.distribution else {}) | changes
        return weighted_loss(
            self.head,
            self.hidden,
            self.tokens,
            self.weights,
            algorithm.per_token,
            vocab_size=V,
            given=self.given,
            **arguments,
        )

    def dense(self, algorithm: Algorithm) -> tuple[Tensor, dict[str, Tensor]]:
        """Whole logits, differentiated by autograd."""
        student, teacher = (
            dense_logits(head, hidden).log_softmax(-1)
            for head, hidden in ((self.head, self.hidden), (self.teacher_head, self.teacher_hidden))
        )
        values = algorithm.per_token(student, teacher, self.tokens, self.given)
        loss = (values.pop("loss") * self.weights.to(student.dtype)).sum()
        return loss, {name: value.detach().sum() for name, value in values.items()}


def dense_logits(head: Head, hidden: Tensor) -> Tensor:
    logits = hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap))[:, :V]


def gradients(loss: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, case.learned)


@pytest.fixture(params=[1, 2, 1000, None], ids=lambda rows: f"tiles of {rows}" if rows else "as on a GPU")
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that are reduced at a time; or a head in two parts and the slopes of several chunks, as on a GPU."""
    here = SIZES["cpu"]
    of_gpu = replace(here, chunk=1, positions=2, tile=2**62, together=2)
    monkeypatch.setitem(SIZES, "cpu", replace(here, tile=request.param * V) if request.param else of_gpu)
    monkeypatch.setitem(COLUMNS, "cpu", 1 if request.param else 10)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["bias, scale and soft-cap", "plain"])
@pytest.mark.usefixtures("tiles")
def test_values_and_gradients_are_those_of_dense_autograd(
    algorithm: Algorithm, dtype: torch.dtype, tolerance: float, plain: bool
) -> None:
    case = Case(dtype=dtype, plain=plain)
    loss, sums = case.chunked(algorithm, chunk=4)
    expected, expected_sums = case.dense(algorithm)
    assert_close = partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    assert_close(loss, expected)
    assert sums.keys() == expected_sums.keys()
    for name, value in sums.items():
        assert not value.requires_grad
        assert_close(value, expected_sums[name], msg=name)
    for got, wanted in zip(gradients(3 * loss, case), gradients(3 * expected, case), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("algorithm", [MiniLLM(), GKD(), SFT()], ids=named)
@pytest.mark.parametrize("chunk", [1, 3, 11, 500, None])
@pytest.mark.usefixtures("tiles")
def test_the_chunk_size_changes_nothing(algorithm: Algorithm, chunk: int | None) -> None:
    case = Case()
    for one, other in zip(*(gradients(case.chunked(algorithm, chunk=size)[0], case) for size in (chunk, 4)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    case = Case()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        case.hidden, case.head = hidden, replace(case.head, weight=weight, bias=bias)
        return case.chunked(GKD(), chunk=4)[0]

    assert torch.autograd.gradcheck(loss, case.learned)


@pytest.mark.parametrize("algorithm", [MiniLLM(), GKD()], ids=named)
def test_hidden_states_and_logits_of_the_teacher_give_the_same(algorithm: Algorithm) -> None:
    case = Case(dtype=torch.float32)
    logits = case.teacher_head(case.teacher_hidden)
    one, other = case.chunked(algorithm)[0], case.chunked(algorithm, teacher_states=logits, teacher_head=None)[0]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for a, b in zip(gradients(one, case), gradients(other, case), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_another_teacher_moves_the_gradient_and_its_padding_does_not() -> None:
    case = Case(dtype=torch.float32)
    logits = torch.randn(N, PADDED, generator=torch.Generator().manual_seed(1))
    padded_elsewhere = torch.cat([logits[:, :V], torch.full((N, 9), 50.0)], -1)
    first, same, other = (
        gradients(case.chunked(GKD(), teacher_states=t, teacher_head=None)[0], case)[0]
        for t in (logits, padded_elsewhere, logits.flip(-1))
    )
    assert torch.equal(first, same)
    assert ((first - other).abs().amax(-1) > 1e-4).all()


def test_rows_of_the_head_beyond_the_vocabulary_get_no_gradient() -> None:
    case = Case()
    for gradient in gradients(case.chunked(SFT())[0], case)[1:]:
        assert len(gradient) == PADDED
        assert not gradient[V:].any()
        assert gradient[:V].all()


def test_a_head_tied_to_the_embeddings_gets_both_gradients() -> None:
    case = Case(plain=True)

    def gradient(loss_of: Callable[[Algorithm], tuple[Tensor, Any]]) -> Tensor:
        case.hidden = case.head.weight[case.tokens.roll(1)] * 2
        return torch.autograd.grad(loss_of(GKD())[0], case.head.weight)[0]

    torch.testing.assert_close(gradient(case.chunked), gradient(case.dense))


def test_what_is_frozen_gets_no_gradient_and_costs_none() -> None:
    case = Case(plain=True)
    expected = gradients(case.chunked(GKD())[0], case)
    case.head = replace(case.head, weight=case.head.weight.detach())
    (got,) = torch.autograd.grad(case.chunked(GKD())[0], case.hidden)
    torch.testing.assert_close(got, expected[0])
    case.hidden = case.hidden.detach()
    assert not case.chunked(GKD())[0].requires_grad


def test_nothing_is_differentiated_without_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    expected, expected_sums = case.chunked(MiniLLM())

    def refuse(*_: object) -> None:
        raise AssertionError("a backward product under no_grad")

    monkeypatch.setattr(projection, "add_product", refuse)
    with torch.no_grad():
        loss, sums = case.chunked(MiniLLM())
    assert not loss.requires_grad
    torch.testing.assert_close((loss, sums), (expected.detach(), expected_sums))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
def test_no_positions_give_zero_and_a_gradient_of_zeros(algorithm: Algorithm) -> None:
    """A rank without work still backs through its head, as the collectives of ZeRO want it."""
    case = Case(0)
    loss, sums = case.chunked(algorithm, probe=Probe(torch.zeros(0), torch.zeros(0)))
    assert sums.keys() == case.dense(algorithm)[1].keys()
    assert float(loss.detach()) == 0
    assert not any(value.any() for value in sums.values())
    into_hidden, into_weight, _ = gradients(loss, case)
    assert into_hidden.shape == (0, H_STUDENT)
    assert into_weight.shape == (PADDED, H_STUDENT) and not into_weight.any()


def test_a_loss_that_is_not_a_number_spoils_the_gradient() -> None:
    case = Case()
    loss, _ = case.chunked(GKD())
    assert all(gradient.isnan().all() for gradient in gradients(loss * torch.nan, case))


def test_a_second_derivative_is_refused() -> None:
    case = Case()
    (gradient,) = torch.autograd.grad(case.chunked(GKD())[0].square(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    """Many chunks give what one gives in float32, but for slopes that are rounded where the CPU multiplies bfloat16, as on CUDA,
    and for the rounding of the sum."""
    case, exact = Case(64, torch.bfloat16, plain=True), Case(64, torch.bfloat16, plain=True)
    exact.head = replace(exact.head, weight=exact.head.weight.detach().float().requires_grad_())
    exact.hidden = exact.hidden.detach().float().requires_grad_()
    loss, sums = case.chunked(GKD(), chunk=1)
    assert loss.dtype == sums["nll"].dtype == torch.float32
    found, at_once = gradients(loss, case), gradients(case.chunked(GKD())[0], case)
    for got, one, wanted in zip(found, at_once, gradients(exact.chunked(GKD())[0], exact), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, one, atol=0, rtol=2**-7)  # a unit in the last place
        assert float((got - wanted).norm() / wanted.norm()) < 2**-8


class RowsOfTheVocabulary(TorchDispatchMode):
    """How many rows the tensors [..., V] have that each operation makes; views are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in () if func.is_view else tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                name = func.overloadpacket.__name__
                self.rows[name] = max(self.rows.get(name, 0), len(tensor))
        return made


def test_only_products_have_the_rows_of_a_chunk_and_nothing_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], chunk=30 * V, tile=9 * V))
    case = Case(100, plain=True)
    with RowsOfTheVocabulary() as made:
        case.chunked(GKD())[0].backward()
    assert {name for name, rows in made.rows.items() if rows > 9} == {"new_empty", "mm"}  # room for W h, and W h
    assert max(made.rows.values()) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_states": torch.zeros(N, V - 1), "teacher_head": None}, "12 logits for a vocabulary of 13"),
        ({"teacher_head": Head(weight=torch.zeros(V - 1, H_TEACHER))}, "12 rows but the tokenizer 13 tokens"),
        ({"probe": Probe(torch.zeros(N - 1), torch.zeros(N - 1))}, "10 rows for 11 response tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case().chunked(GKD(), **changes)


def test_head_is_its_formula() -> None:
    weight, bias, hidden = torch.randn(PADDED, H_TEACHER), torch.randn(PADDED), torch.randn(3, H_TEACHER)
    product = hidden @ weight.T
    torch.testing.assert_close(Head(weight=weight)(hidden), product)
    torch.testing.assert_close(Head(weight=weight, bias=bias, scale=0.5)(hidden), (product + bias) * 0.5)
    torch.testing.assert_close(Head(weight=weight, softcap=2.0)(hidden), 2 * torch.tanh(product / 2))


def test_a_head_that_is_ready_is_not_made_ready_again() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        head = Head(weight=torch.randn(PADDED, H_TEACHER).to(dtype), bias=torch.randn(PADDED))
        ready = head.ready(V)
        assert torch.equal(ready.weight.float(), head.weight[:V].float())
        again = ready.ready(V)
        assert again.weight.data_ptr() == ready.weight.data_ptr()
        assert again.packed is ready.packed


def test_head_keeps_bfloat16_products_in_float32() -> None:
    weight, hidden = (torch.randn(rows, 64) for rows in (PADDED, 5))
    logits = Head(weight=weight.bfloat16())(hidden.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.bfloat16().float() @ weight.bfloat16().float().T)


def test_gradients_of_bfloat16_heads_are_right_to_its_rounding() -> None:
    """Large enough for the CPU's own products of bfloat16, where the slope is rounded as on CUDA."""
    generator = torch.Generator().manual_seed(0)
    width, vocab_size, num = 64, 512, 96
    weight, teacher = (torch.randn(vocab_size, width, generator=generator).bfloat16() / 8 for _ in range(2))
    hidden, states = (torch.randn(num, width, generator=generator).bfloat16() for _ in range(2))
    tokens = torch.randint(vocab_size, (num,), generator=generator)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        learned = [value.to(dtype).requires_grad_() for value in (weight, hidden)]
        loss, _ = weighted_loss(
            Head(weight=learned[0]),
            learned[1],
            tokens,
            torch.full((num,), 1 / num),
            lambda student, law, *_: {"loss": reverse_kl(student, law)},  # pyright: ignore[reportArgumentType]
            vocab_size=vocab_size,
            teacher_states=states.to(dtype),
            teacher_head=Head(weight=teacher.to(dtype)),
        )
        found.append((loss, *torch.autograd.grad(loss, learned)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    for got, wanted in zip(found[0][1:], found[1][1:], strict=True):
        assert (got.float() - wanted).norm() < 2**-8 * wanted.norm()


def test_cut_keeps_the_first_rows_without_a_copy() -> None:
    head = Head(weight=torch.randn(PADDED, H_TEACHER), bias=torch.randn(PADDED), scale=2.0)
    cut, hidden = head.cut(V), torch.randn(3, H_TEACHER)
    assert cut.weight.data_ptr() == head.weight.data_ptr()
    torch.testing.assert_close(cut(hidden), head(hidden)[:, :V])
    with pytest.raises(ValueError, match="16 rows but the tokenizer 17 tokens"):
        head.cut(PADDED + 1)


def test_probe_is_the_log_normaliser_and_log_prob_over_the_true_vocabulary() -> None:
    case = Case(dtype=torch.float32)
    logits = case.teacher_head(case.teacher_hidden)[:, :V]
    normaliser, logprobs = teacher_probe(case.teacher_hidden, case.teacher_head, case.tokens, V, chunk=4)
    torch.testing.assert_close(normaliser, logits.logsumexp(-1))
    torch.testing.assert_close(logprobs, -torch.nn.functional.cross_entropy(logits, case.tokens, reduction="none"))
    torch.testing.assert_close(teacher_probe(logits, None, case.tokens, V), Probe(normaliser, logprobs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("tiles")
def test_true_scores_are_accepted(dtype: torch.dtype) -> None:
    case = Case(64, dtype)
    case.teacher_head = replace(case.teacher_head, softcap=None)
    case.chunked(GKD(), probe=teacher_probe(case.teacher_hidden, case.teacher_head, case.tokens, V, chunk=3))
    logits = case.teacher_head(case.teacher_hidden)
    case.chunked(GKD(), teacher_states=logits, teacher_head=None, probe=teacher_probe(logits, None, case.tokens, V))
    # A teacher that rounds its own logits to the dtype it computes in is still recognised.
    case.chunked(GKD(), probe=teacher_probe(logits.to(dtype), None, case.tokens, V))


def test_a_sparse_probe_finds_another_head_and_what_is_not_finite_anywhere() -> None:
    case = Case(64, torch.float32)
    head = case.teacher_head
    probe = teacher_probe(case.teacher_hidden, head, case.tokens, V)
    for values in probe:
        values[torch.arange(64) % 16 != 0] = torch.nan
    case.chunked(GKD(), probe=probe)
    with pytest.raises(ValueError, match=r"at 4 of 4 positions\. Likely: the head is not this teacher's"):
        case.chunked(GKD(), teacher_head=replace(head, weight=head.weight.flip(0)), probe=probe)
    overflowed = case.teacher_hidden.clone()
    overflowed[7, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        case.chunked(GKD(), teacher_states=overflowed, probe=probe)


HEAD_CAUSE = "the head is not this teacher's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("defect", "cause"),
    [
        ("another head", HEAD_CAUSE),
        ("missing bias", HEAD_CAUSE),
        ("missing scale", HEAD_CAUSE),
        ("missing soft-cap", HEAD_CAUSE),
        ("missing final norm", HEAD_CAUSE),
        ("padded vocabulary", HEAD_CAUSE),
        ("tokens off by one", "off by one"),
        ("one damaged row", "damaged or stale"),
        ("overflow", "not finite"),
    ],
)
def test_every_defect_is_refused_with_its_likely_cause(defect: str, cause: str, dtype: torch.dtype) -> None:
    case = Case(64, dtype)
    case.teacher_hidden = hidden = case.teacher_hidden * 3
    head = case.teacher_head
    probe = teacher_probe(hidden, head, case.tokens, PADDED if defect == "padded vocabulary" else V)
    heads = {
        "another head": replace(head, weight=head.weight.flip(0)),
        "missing bias": replace(head, bias=None),
        "missing scale": replace(head, scale=1.0),
        "missing soft-cap": replace(head, softcap=None),
    }
    damaged = hidden.clone()
    damaged[7] = damaged[8]
    overflowed = hidden.clone()
    overflowed[0, 0] = torch.nan
    states = {
        "missing final norm": hidden / hidden.norm(dim=-1, keepdim=True),
        "one damaged row": damaged,
        "overflow": overflowed,
    }
    if defect == "tokens off by one":
        case.tokens = case.tokens.roll(1)
    sent = states.get(defect, hidden)
    with pytest.raises(ValueError, match=cause):
        case.chunked(GKD(), teacher_states=sent, teacher_head=heads.get(defect, head), probe=probe, chunk=5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.parametrize("algorithm", [GKD(reward_weight=0.3), MiniLLM(), AKL(), DistiLLM2()], ids=named)
def test_compiled_is_the_same(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # matrices of vLLM engines of other tests free themselves by an operator, which must not be while one is traced
    monkeypatch.setitem(SIZES, "cpu", replace(SIZES["cpu"], tile=2 * V))
    case = Case(dtype=torch.float32)
    (loss, sums), (expected, expected_sums) = (case.chunked(algorithm, chunk=5, compiled=compiled) for compiled in (True, False))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums, expected_sums)
    for got, wanted in zip(gradients(loss, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"], "a program ends in the middle"
    case.chunked(algorithm, chunk=5, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled a second time"
