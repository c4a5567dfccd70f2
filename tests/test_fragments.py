"""What one layout of ranks has written, any other reads."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raykd.fragments import Fragment, read, write

WHOLE = {("weight", "a.b"): torch.arange(1.0, 98.0), ("exp_avg", "a.b"): -torch.arange(1.0, 98.0), ("weight", "c"): torch.ones(1)}


def split(values: dict[tuple[str, str], Tensor], cuts: list[int]) -> list[list[Fragment]]:
    """For each rank the pieces between two cuts."""
    ranks = []
    for low, high in pairwise([0, *sorted(cuts), 97]):
        pieces = ((kind, name, tensor[low:high]) for (kind, name), tensor in values.items())
        ranks.append([Fragment(kind, name, low, piece) for kind, name, piece in pieces if len(piece)])
    return ranks


CUTS = st.lists(st.integers(0, 97), max_size=4)


@settings(max_examples=40, deadline=None)
@given(written=CUTS, wanted=CUTS)
def test_pieces_are_put_together_however_they_were_cut(written: list[int], wanted: list[int]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for rank, fragments in enumerate(split(WHOLE, written)):
            write(folder, rank, fragments)
        found = {key: torch.zeros_like(tensor) for key, tensor in WHOLE.items()}
        for fragments in split(found, wanted):
            read(folder, fragments)
    assert all(torch.equal(found[key], tensor) for key, tensor in WHOLE.items())


def test_many_files_of_a_rank_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raykd.weights.BUCKET_BYTES", 8)
    ((*fragments,),) = split(WHOLE, [])
    write(tmp_path, 0, fragments)
    assert len(list(tmp_path.iterdir())) == 3
    found = {key: torch.zeros_like(tensor) for key, tensor in WHOLE.items()}
    read(tmp_path, split(found, [])[0])
    assert all(torch.equal(found[key], tensor) for key, tensor in WHOLE.items())


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    for rank, fragments in enumerate(split(WHOLE, [40])):
        write(tmp_path, rank, fragments)
    (tmp_path / "fragments-00001-00.safetensors").unlink()
    with pytest.raises(ValueError, match=r"misses 57 numbers of a\.b \(weight\): a file is gone"):
        read(tmp_path, split({key: tensor.clone() for key, tensor in WHOLE.items()}, [])[0])
