"""Chunked projection beside the same computation done whole, and the integrity check of teacher scores."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from raykd.algorithms import GKD, SFT, MiniLLM
from raykd.algorithms.base import Algorithm
from raykd.projection import Head, Probe, per_token, teacher_probe, verify_scores
from raykd.records import Scores

N, H_STUDENT, H_TEACHER, V, PADDED = 11, 6, 8, 13, 16


class CountingHead(nn.Module):
    """A student's output module of a padded vocabulary that records how many rows each call had."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H_STUDENT, PADDED, bias=False)
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return self.linear(hidden)


def inputs(num_rows: int = N, dtype: torch.dtype = torch.float32) -> tuple[CountingHead, Tensor, Tensor, Head, Tensor]:
    """Student head, student hidden, tokens, teacher head, teacher hidden."""
    torch.manual_seed(0)
    head = CountingHead()
    student_hidden = torch.randn(num_rows, H_STUDENT, requires_grad=True)
    teacher_head = Head(weight=torch.randn(PADDED, H_TEACHER).to(dtype), bias=torch.randn(PADDED), scale=0.7, softcap=5.0)
    return head, student_hidden, torch.randint(V, (num_rows,)), teacher_head, torch.randn(num_rows, H_TEACHER).to(dtype)


def facts(num_rows: int = N) -> dict[str, Tensor]:
    """What ``per_sequence`` of any algorithm here says of the tokens."""
    generator = torch.Generator().manual_seed(3)
    names = ("advantage", "behaviour", "sampled_reverse_kl")
    return {name: torch.randn(num_rows, generator=generator) for name in names}


def total(values: dict[str, Tensor]) -> Tensor:
    differentiable = [value for value in values.values() if value.requires_grad]
    return torch.stack([(value * torch.arange(1.0, len(value) + 1)).sum() for value in differentiable]).sum()


def gradients(loss: Tensor, head: CountingHead, hidden: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [head.linear.weight, hidden])


@pytest.mark.parametrize("algorithm", [MiniLLM(), GKD(), SFT()])
@pytest.mark.parametrize("chunk", [1, 3, 8, 11, 500, None])
def test_any_chunk_size_equals_the_whole(algorithm: Algorithm, chunk: int | None) -> None:
    head, hidden, tokens, teacher_head, teacher_hidden = inputs()
    student = head.linear(hidden)[:, :V].log_softmax(-1)
    teacher = teacher_head(teacher_hidden)[:, :V].log_softmax(-1)
    expected = algorithm.per_token(student, teacher, tokens, facts())
    got = per_token(
        hidden,
        head,
        tokens,
        algorithm.per_token,
        vocab_size=V,
        given=facts(),
        chunk=chunk,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    for one, other in zip(gradients(total(got), head, hidden), gradients(total(expected), head, hidden), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algorithm", [MiniLLM(), GKD()])
def test_hidden_states_and_logits_of_the_teacher_give_the_same(algorithm: Algorithm) -> None:
    head, hidden, tokens, teacher_head, teacher_hidden = inputs()
    logits = teacher_head(teacher_hidden)
    one = per_token(
        hidden,
        head,
        tokens,
        algorithm.per_token,
        vocab_size=V,
        given=facts(),
        chunk=4,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )
    other = per_token(hidden, head, tokens, algorithm.per_token, vocab_size=V, given=facts(), chunk=5, teacher_logits=logits)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)
    for a, b in zip(gradients(total(one), head, hidden), gradients(total(other), head, hidden), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_another_teacher_moves_the_gradient_and_its_padding_does_not() -> None:
    head, hidden, tokens, _, _ = inputs()
    logits = torch.randn(N, PADDED)
    padded_elsewhere = torch.cat([logits[:, :V], torch.full((N, 9), 50.0)], -1)
    first, same, other = (
        gradients(
            total(per_token(hidden, head, tokens, GKD().per_token, vocab_size=V, given=facts(), teacher_logits=t)), head, hidden
        )[1]
        for t in (logits, padded_elsewhere, logits.flip(-1))
    )
    assert torch.equal(first, same)
    assert ((first - other).abs().amax(-1) > 1e-4).all()


def test_rows_of_the_head_beyond_the_vocabulary_get_no_gradient() -> None:
    head, hidden, tokens, _, _ = inputs()
    weight_gradient, _ = gradients(
        total(per_token(hidden, head, tokens, SFT().per_token, vocab_size=V, given=facts())), head, hidden
    )
    assert not weight_gradient[V:].any()
    assert weight_gradient[:V].any()


def test_no_call_of_the_head_exceeds_a_chunk_and_backward_recomputes() -> None:
    head, hidden, tokens, _, _ = inputs()
    values = per_token(hidden, head, tokens, SFT().per_token, vocab_size=V, given=facts(), chunk=4)
    assert head.rows == [4, 4, 3]
    total(values).backward()
    assert sorted(head.rows) == sorted([4, 4, 3] * 2)


def test_a_single_chunk_is_not_computed_twice() -> None:
    head, hidden, tokens, teacher_head, teacher_hidden = inputs()
    values = per_token(
        hidden,
        head,
        tokens,
        GKD().per_token,
        vocab_size=V,
        given=facts(),
        chunk=N,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )
    total(values).backward()
    assert head.rows == [N]


def test_nothing_of_the_vocabulary_is_kept_for_backward() -> None:
    """Between forward and backward of several chunks no tensor with a vocabulary axis is alive in the graph."""
    head, hidden, tokens, teacher_head, teacher_hidden = inputs()
    teacher = {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
    saved: list[tuple[int, ...]] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        per_token(hidden, head, tokens, GKD().per_token, vocab_size=V, given=facts(), chunk=N - 1, **teacher)
    assert (N - 1, H_STUDENT) in saved
    assert not [shape for shape in saved if shape[-1:] in ((V,), (PADDED,))]


@pytest.mark.parametrize("num_rows", [0, 2, 5])
def test_missing_chunks_call_the_head_and_count_for_nothing(num_rows: int) -> None:
    """A rank with fewer positions calls its head as often as the others, forward and backward."""
    head, hidden, tokens, teacher_head, teacher_hidden = inputs(num_rows)
    reduce = MiniLLM().per_token
    teacher = {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head}
    probe = teacher_probe(teacher_hidden, teacher_head, tokens, V)
    values = per_token(
        hidden, head, tokens, reduce, vocab_size=V, given=facts(num_rows), chunk=2, num_chunks=4, probe=probe, **teacher
    )
    assert len(head.rows) == 4
    assert all(value.shape == (num_rows,) for value in values.values())
    idle_gradients = gradients(total(values), head, hidden)
    assert len(head.rows) == 8
    plain = per_token(hidden, head, tokens, reduce, vocab_size=V, given=facts(num_rows), chunk=2, **teacher)
    for name in plain:
        torch.testing.assert_close(values[name], plain[name])
    for one, other in zip(idle_gradients, gradients(total(plain), head, hidden), strict=True):
        torch.testing.assert_close(one, other)
    if not num_rows:
        assert not idle_gradients[0].any()
        assert idle_gradients[1].shape == (0, H_STUDENT)


def test_student_head_in_bfloat16_is_reduced_in_float32() -> None:
    head, hidden, tokens, _, _ = inputs()
    values = per_token(hidden.bfloat16(), head.bfloat16(), tokens, SFT().per_token, vocab_size=V, given=facts())
    assert values["nll"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_hidden": torch.zeros(N, H_TEACHER)}, "teacher_hidden with teacher_head"),
        ({"teacher_head": Head(weight=torch.zeros(PADDED, H_TEACHER))}, "teacher_hidden with teacher_head"),
        ({"probe": Probe(torch.zeros(N), torch.zeros(N))}, "probe needs"),
        ({"teacher_logits": torch.zeros(N, V - 1)}, "12 logits for a vocabulary of 13"),
    ],
)
def test_inconsistent_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    head, hidden, tokens, _, _ = inputs()
    with pytest.raises(ValueError, match=message):
        per_token(hidden, head, tokens, GKD().per_token, vocab_size=V, given=facts(), **arguments)  # pyright: ignore[reportArgumentType]


def test_head_is_its_formula() -> None:
    weight, bias, hidden = torch.randn(PADDED, H_TEACHER), torch.randn(PADDED), torch.randn(3, H_TEACHER)
    product = hidden @ weight.T
    torch.testing.assert_close(Head(weight=weight)(hidden), product)
    torch.testing.assert_close(Head(weight=weight, bias=bias, scale=0.5)(hidden), (product + bias) * 0.5)
    torch.testing.assert_close(Head(weight=weight, softcap=2.0)(hidden), 2 * torch.tanh(product / 2))


def test_head_keeps_bfloat16_products_in_float32() -> None:
    weight, hidden = (torch.randn(rows, 64) for rows in (PADDED, 5))
    logits = Head(weight=weight.bfloat16())(hidden.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.bfloat16().float() @ weight.bfloat16().float().T)


def test_cut_keeps_the_first_rows_without_a_copy() -> None:
    head = Head(weight=torch.randn(PADDED, H_TEACHER), bias=torch.randn(PADDED), scale=2.0)
    cut, hidden = head.cut(V), torch.randn(3, H_TEACHER)
    assert cut.weight.data_ptr() == head.weight.data_ptr()
    torch.testing.assert_close(cut(hidden), head(hidden)[:, :V])
    with pytest.raises(ValueError, match="16 rows but the tokenizer 17 tokens"):
        head.cut(PADDED + 1)


def scores(head: Head, hidden: Tensor, tokens: Tensor) -> Scores:
    probe = teacher_probe(hidden, head, tokens, V, chunk=3)
    return Scores(offsets=(0, len(tokens)), log_normaliser=probe.log_normaliser, logprobs=probe.logprobs, hidden=hidden)


def test_probe_is_the_log_normaliser_and_log_prob_over_the_true_vocabulary() -> None:
    _, _, tokens, head, hidden = inputs()
    logits = head(hidden)[:, :V]
    normaliser, logprobs = teacher_probe(hidden, head, tokens, V, chunk=4)
    torch.testing.assert_close(normaliser, logits.logsumexp(-1))
    torch.testing.assert_close(logprobs, -torch.nn.functional.cross_entropy(logits, tokens, reduction="none"))
    torch.testing.assert_close(teacher_probe(logits, None, tokens, V), Probe(normaliser, logprobs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_true_scores_are_accepted(dtype: torch.dtype) -> None:
    _, _, tokens, head, hidden = inputs(64, dtype)
    head = replace(head, softcap=None)
    honest = scores(head, hidden, tokens)
    verify_scores(honest, head, tokens, V)
    # A teacher that rounds its own logits to the dtype it computes in is still recognised.
    rounded = teacher_probe(head(hidden).to(dtype), None, tokens, V)
    verify_scores(replace(honest, log_normaliser=rounded.log_normaliser, logprobs=rounded.logprobs), head, tokens, V)


def test_no_rows_and_logits_are_accepted() -> None:
    _, _, tokens, head, hidden = inputs()
    verify_scores(scores(head, hidden[:0], tokens[:0]), head, tokens[:0], V)
    verify_scores(replace(scores(head, hidden, tokens), hidden=None, logits=head(hidden)), None, tokens, V)


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
        ("another rollout's length", "offsets"),
    ],
)
def test_every_defect_is_refused_with_its_likely_cause(defect: str, cause: str, dtype: torch.dtype) -> None:
    _, _, tokens, head, hidden = inputs(64, dtype)
    hidden = hidden * 2
    honest = scores(head, hidden, tokens)
    vocab_size = PADDED if defect == "padded vocabulary" else V
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
    chosen = {"tokens off by one": tokens.roll(1), "another rollout's length": tokens[1:]}.get(defect, tokens)
    sent = replace(honest, hidden=states.get(defect, hidden))
    with pytest.raises(ValueError, match=cause):
        verify_scores(sent, heads.get(defect, head), chosen, vocab_size)


def test_the_check_inside_the_chunks_finds_the_same() -> None:
    head, hidden, tokens, teacher_head, teacher_hidden = inputs()
    honest = scores(teacher_head, teacher_hidden, tokens)
    teacher = {"teacher_hidden": cast(Tensor, honest.hidden), "teacher_head": teacher_head, "probe": Probe.of(honest)}
    per_token(hidden, head, tokens, GKD().per_token, vocab_size=V, given=facts(), chunk=4, **teacher)
    teacher["teacher_head"] = replace(teacher_head, bias=None)
    with pytest.raises(ValueError, match=HEAD_CAUSE):
        per_token(hidden, head, tokens, GKD().per_token, vocab_size=V, given=facts(), chunk=4, **teacher)
