"""A learner's state as files, whoever holds which part of it.

    fragments-00002-00.safetensors   of rank 2: pieces of flattened parameters and of AdamW's moments, in float32, each named
                                     "kind/first number/parameter"

Every rank writes what it holds and reads what it is to hold from whatever file has it, so that the number of ranks, ZeRO's stage,
precision and offloading may be others when a run goes on. DeepSpeed's own checkpoints are of the layout that wrote them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raykd.weights import grouped

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Fragment:
    """What this rank holds of a parameter, or of one of its moments."""

    kind: str
    parameter: str
    start: int
    """Its first number in the flattened parameter."""
    values: Tensor
    """A view, one-dimensional, float32."""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.start}/{self.parameter}"


class State:
    """The float32 weights and AdamW's moments of a DeepSpeed engine, as far as this rank holds them."""

    def __init__(self, engine: Any, parameters: Mapping[str, Tensor]) -> None:
        """``parameters``: those that are learned, by name, tied ones once."""
        self._optimiser: Any = engine.basic_optimizer
        self._zero: Any = engine.optimizer if engine.zero_optimization_stage() else None
        self._stage = engine.zero_optimization_stage()
        self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._parameters = parameters

    @property
    def steps(self) -> int:
        """AdamW's steps since its moments were zero."""
        return max((int(state["step"]) for state in self._optimiser.state.values()), default=0)

    def fragments(self) -> Iterator[Fragment]:
        """All that this rank holds."""
        for name, start, length, flat, offset in self._places():
            moments = self._moments(flat)
            for kind, whole in ((WEIGHT, flat.detach()), *((kind, moments[kind]) for kind in MOMENTS)):
                yield Fragment(kind, name, start, whole.view(-1).narrow(0, offset, length))

    def written(self) -> list[Fragment]:
        """What this rank writes: parameters that all ranks hold whole are shared out among them."""
        names = [*self._parameters]
        own = {*(names if self._stage else names[self._rank :: self._ranks])}
        return [fragment for fragment in self.fragments() if fragment.parameter in own]

    def restored(self, steps: int) -> None:
        """The fragments have new values, of after so many steps: the weights that the model computes with follow."""
        for state in self._optimiser.state.values():
            state["step"].fill_(steps)
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero.checkpoint_event_prologue()
            with torch.no_grad():
                for name, _, length, flat, offset in self._places():
                    part: Any = self._parameters[name]
                    part.ds_tensor.narrow(0, 0, length).copy_(flat.narrow(0, offset, length))
            self._zero.checkpoint_event_epilogue()

    def _places(self) -> Iterator[tuple[str, int, int, Tensor, int]]:
        """Of every parameter that this rank holds numbers of: its name, the first of them, how many, the tensor that AdamW
        knows, and where they begin there."""
        for name, parameter in self._parameters.items():
            found = self._place(parameter)
            if found is not None and found[1]:
                yield name, *found

    def _place(self, parameter: Any) -> tuple[int, int, Tensor, int] | None:
        if not self._stage:
            return 0, parameter.numel(), parameter, 0
        if self._stage == 3:
            group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self._rank * length  # the last part may be padded
            return start, max(0, min(length, parameter.ds_numel - start)), self._zero.fp32_partitioned_groups_flat[group], offset
        if (mapping := parameter._hp_mapping) is None:
            return None
        bfloat16 = hasattr(self._zero, "fp32_groups_flat_partition")
        flats = self._zero.fp32_groups_flat_partition if bfloat16 else self._zero.single_partition_of_fp32_groups
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return here.start, here.numel, flats[mapping.param_group_index], there.start

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of one of its tensors, which it makes itself only at its first step."""
        state = self._optimiser.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS})
        return state


def write(folder: Path, rank: int, fragments: Iterable[Fragment]) -> None:
    """Files of this rank, of bounded size: what lies on a GPU passes through the machine's memory."""
    by_name = {fragment.name: fragment.values for fragment in fragments}
    for number, names in enumerate(grouped({name: values.nbytes for name, values in by_name.items()})):
        save_file({name: by_name[name].cpu() for name in names}, folder / f"fragments-{rank:05d}-{number:02d}.safetensors")


def read(folder: Path, fragments: Iterable[Fragment]) -> None:
    """Fill the fragments from the files of all ranks. Raises ValueError where numbers are missing."""
    pieces: dict[tuple[str, str], list[tuple[int, Any]]] = defaultdict(list)
    with ExitStack() as files:
        for path in sorted(folder.glob("fragments-*.safetensors")):
            file = files.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118  it is no dictionary
                kind, start, parameter = key.split("/", 2)
                pieces[kind, parameter].append((int(start), file.get_slice(key)))
        for fragment in fragments:
            first, missing = fragment.start, len(fragment.values)
            for start, piece in pieces[fragment.kind, fragment.parameter]:
                low, high = max(start, first), min(start + piece.get_shape()[0], first + len(fragment.values))
                if low < high:
                    fragment.values[low - first : high - first] = piece[low - start : high - start]
                    missing -= high - low
            if missing:
                raise ValueError(f"{folder} misses {missing} numbers of {fragment.parameter} ({fragment.kind}): a file is gone")
