"""Excess accumulated error: what the student's own prefixes cost beyond the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def excess_error(own_prefixes: Sequence[Tensor], teacher_prefixes: Sequence[Tensor]) -> Tensor:
    """ExAccErr(l) = 100 * (R(l) - l eps(l)) / (l eps(l)) in percent, for l = 1, 2, ...; Arora et al., ACL Findings 2022.

        R(l)       = sum_{t <= l} E[KL_t | prefix y_<t written by the student]
        l eps(l)   = sum_{t <= l} E[KL_t | prefix y_<t written by the teacher]
        KL_t       = KL(p(. | x, y_<t) || q(. | x, y_<t)), p the teacher, q the student: forward KL, as in MiniLLM

    Each argument holds one tensor ``[T_i]`` of KL_t for every response. E at position t is over the responses that still run
    there, T_i >= t. (MiniLLM's code lets ended ones count as 0, which bends the curve towards a constant at large l.) The curve
    ends where the first of the two sets of prefixes does; 0 is no exposure bias, and so is 0 / 0, of a student that is
    like its teacher; the range is [-100, inf].
    """
    own, teacher = (_running_mean(kls).cumsum(0) for kls in (own_prefixes, teacher_prefixes))
    length = min(len(own), len(teacher))
    own, teacher = own[:length], teacher[:length]
    return torch.where(own == teacher, 0.0, 100 * (own / teacher - 1))


def _running_mean(kls: Sequence[Tensor]) -> Tensor:
    """The mean at each position over the sequences that reach it; [max T_i] float64."""
    return pad_sequence([kl.double() for kl in kls], batch_first=True, padding_value=torch.nan).nanmean(0)
