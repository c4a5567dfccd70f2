"""Segments of one process that processes of other nodes read: by RDMA where both nodes have it, over TCP elsewhere (NIXL).

    owner:   window = Window(); remote = window.show(segment)       the segment's memory can be read from now on
    others:  reader = Reader(); copy = reader.read(remote)          a segment of their own node, with the same regions

A read is one-sided: the owner's Python takes no part in it, so that a version lies there until somebody wants it, and a reader
that dies holds nobody up. UCX chooses the network; UCX_NET_DEVICES and UCX_TLS in the environment restrict it.
"""

import os
import time
import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from raykd.sharing import Segment

DEADLINE_S = 600.0
"""Longest wait for one read."""
PAUSE_S = 0.001
"""Between two looks at a read in progress."""
IDLE_US = 100_000
"""How long an owner's thread sleeps without a message. NIXL's Python interface says 0, and its thread never rests then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Where a segment lies, for processes of other nodes."""

    owner: bytes
    """NIXL's description of the process: its addresses, and the keys of its memory."""
    address: int
    size: int


class Window:
    """What the owner of segments shows to other nodes."""

    def __init__(self) -> None:
        self._agent = _Agent(serves=True)
        self._shown: set[Segment] = set()

    def show(self, segment: Segment) -> Remote:
        """Where the segment can be read."""
        if segment not in self._shown:
            self._agent.register(segment)
            self._shown.add(segment)
        return Remote(owner=self._agent.description(), address=_address(segment), size=segment.size)


class Reader:
    """Copies segments of other nodes to one of its own, over what it has read before."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._agent: _Agent | None = None
        self._copy: Segment | None = None

    def read(self, remote: Remote) -> Segment:
        """The whole segment. Raises ConnectionError where it cannot be read, or not in time."""
        if self._agent is None or self._copy is None or self._copy.size < remote.size:
            self._agent = _Agent(serves=False)  # first: with it goes the one before, which knows memory that goes next
            self._copy = Segment(remote.size)
            self._agent.register(self._copy)
        try:
            self._agent.read(remote, self._copy, self._deadline_s)
        except Exception as error:  # NIXL has a class of its own for each of its states
            raise ConnectionError(
                f"weights could not be read from the learner's node ({error}): see that it is alive and reachable on the network "
                "that UCX chooses (UCX_NET_DEVICES restricts it), and resume the run"
            ) from error
        return self._copy


def available() -> bool:
    """Whether NIXL is installed here."""
    return find_spec("nixl") is not None


class _Agent:
    """NIXL in this process, with UCX."""

    def __init__(self, *, serves: bool) -> None:
        """``serves``: a thread answers others, for networks that cannot read memory by themselves."""
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        from nixl._api import nixlBind  # pyright: ignore[reportAttributeAccessIssue]  made when it is imported

        self._nixl: Any = nixlBind
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = serves, IDLE_US
        self._agent = self._nixl.nixlAgent(f"raykd-{uuid.uuid4()}", config)
        parameters, _ = self._agent.getPluginParams("UCX")
        self._ucx = self._agent.createBackend("UCX", parameters)
        self._owner = b""
        self._owner_name = ""

    def register(self, segment: Segment) -> None:
        """Before anything is read from it or into it."""
        places = [(_address(segment), segment.size, 0, "")]
        self._agent.registerMem(self._nixl.nixlRegDList(self._nixl.DRAM_SEG, places), [self._ucx])

    def description(self) -> bytes:
        """Describes this process and the memory it has registered, for processes of other nodes."""
        return self._agent.getLocalMD()

    def read(self, remote: Remote, into: Segment, deadline_s: float) -> None:
        """Copy the whole of a segment to the front of one of ours."""
        self._meet(remote.owner)
        theirs, ours = (
            self._nixl.nixlXferDList(self._nixl.DRAM_SEG, [(address, remote.size, 0)])
            for address in (remote.address, _address(into))
        )
        transfer = self._agent.createXferReq(self._nixl.NIXL_READ, ours, theirs, self._owner_name, b"", [self._ucx])
        deadline = time.monotonic() + deadline_s
        try:
            state = self._agent.postXferReq(transfer, b"")
            while state == self._nixl.NIXL_IN_PROG:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it took more than {deadline_s:g} s")
                time.sleep(PAUSE_S)
                state = self._agent.getXferStatus(transfer)
            if state != self._nixl.NIXL_SUCCESS:
                raise ConnectionError(f"NIXL says {state}")
        finally:
            self._agent.releaseXferReq(transfer)

    def _meet(self, owner: bytes) -> None:
        """Know a process by its description, which changes with what it shows."""
        if owner != self._owner:
            if self._owner_name:
                self._agent.invalidateRemoteMD(self._owner_name)
            self._owner, self._owner_name = b"", ""
            self._owner_name = self._agent.loadRemoteMD(owner)
            self._owner = owner


def _address(segment: Segment) -> int:
    return segment.memory.ctypes.data
