"""Whether a model's probabilities are right as often as they say."""

import torch
from torch import Tensor


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of rows whose most probable label is the right one; ``[N, C], [N] int64 -> [0, 1]``."""
    return float((probabilities.argmax(-1) == labels).double().mean())


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """ECE = sum_b n_b / N |acc(b) - conf(b)|; Naeini et al., AAAI 2015; Guo et al., ICML 2017. ``[N, C], [N] int64 -> [0, 1]``.

    Rows fall by the probability of their most probable label into ``bins`` ranges of equal width, closed above; conf(b) is
    its mean in range b, acc(b) the share of right answers there.
    """
    confidence, predicted = probabilities.double().max(-1)
    gaps = (predicted == labels).double() - confidence
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    # n_b |mean gap of b| is |the sum of its gaps|.
    return float(torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, gaps).abs().sum() / len(labels))
