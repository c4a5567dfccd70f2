"""Texts that stay in an engine between calls: a continuation computes its new tokens, not all since the last full KV block.

Built on vLLM's resumable requests (its streaming input): a request that has finished a piece keeps its place and its keys
and values until the next piece comes. What it wrote last has not been read by the model, so the next piece begins with it.

Tokens that others wrote are scored by a piece for each: the log-prob of the token that follows is asked for, and what is picked
in its place is thrown away. Where the sampler is ours (``cpu_sampler``), the last piece scores the last of them as it reads
them, unless the text has to be read anew: parts of it could be found cached then, and would not be computed.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput, SamplingParams

CROWDED = 0.9
"""Share of the KV cache in use above which texts at rest have to go."""

Piece = tuple[int, "SamplingParams"]
"""How far the text is read, and what is written after that."""

Scores = dict[str, dict[int, float]]
"""Log-probs of tokens scored as they were read, by the request and the position."""

SCORED = "raykd_scored"
"""In a piece's ``extra_args``: the first and the end of the positions to score while it is read."""


@dataclass(frozen=True, slots=True)
class Written:
    """What vLLM wrote for one call, its own log-probs beside it."""

    tokens: list[int]
    """Tokens of the last piece."""
    logprobs: list[list[float]]
    """For each token its log-prob, then that of the token asked for at its place."""
    stopped: bool
    """By a stop token."""
    scored: list[float] | None = field(default_factory=list)
    """Log-probs of the tokens that the pieces before the last are for; None where vLLM found one of them cached."""

    @classmethod
    def of(cls, output: "RequestOutput", start: int = 0) -> "Written":
        """vLLM's output from position ``start`` on."""
        (written,) = output.outputs
        flat: Any = written.logprobs
        spans = zip(flat.start_indices[start:], flat.end_indices[start:], strict=True)
        return cls(list(written.token_ids[start:]), [flat.logprobs[i:j] for i, j in spans], written.finish_reason == "stop")


@dataclass(slots=True)
class _Session:
    request_id: str
    read: list[int] = field(default_factory=list)
    """The tokens that vLLM will have kept when the next piece comes."""
    num_outputs: int = 0
    """Outputs delivered so far; vLLM's are cumulative."""
    num_pieces: int = 0
    """Pieces of the last call."""
    num_unfinished: int = 0
    at_once: range = range(0)
    """Positions that the last piece scores in the place of pieces of their own."""


def prompt_of(tokens: list[int], salt: str) -> Any:
    """What vLLM reads; prompts of different ``salt`` share no keys and values in its prefix cache."""
    return {"type": "token", "prompt_token_ids": tokens, "cache_salt": salt}


class Sessions:
    """The resident texts of one engine, by the names their callers gave them. Lives in the engine's thread.

    A session may end between any two calls, for want of room or with its engine: a call always brings the whole text.
    """

    def __init__(self, engine: "LLMEngine", scores: Scores | None = None) -> None:
        """``scores``: where the engine's sampler puts them, if it does."""
        self._engine = engine
        self._scores = scores
        self._sessions: dict[str, _Session] = {}
        self._at_rest: dict[str, None] = {}  # ordered: the one that has rested longest is first
        self._num_opened = 0

    def rests(self, name: str) -> bool:
        """Whether the text is here and waits to be continued."""
        return name in self._at_rest

    def resume(self, name: str, text: list[int], pieces: Sequence[Piece], salt: str) -> str:
        """Queue the pieces of a text, the first of which reads what is new; ``salt`` as for ``prompt_of``. Returns vLLM's name of
        the request."""
        session = self._sessions.get(name)
        if session is not None and len(session.read) < pieces[0][0] and session.read == text[: len(session.read)]:
            del self._at_rest[name]
            pieces, session.at_once = self._join(pieces)
        else:
            self.end(name)
            self._num_opened += 1
            session = self._sessions[name] = _Session(f"{name}/{self._num_opened}")
        for end, params in pieces:
            self._queue(session.request_id, text[len(session.read) : end], params, salt)
            session.read = text[:end]
        session.num_pieces = session.num_unfinished = len(pieces)
        return session.request_id

    def finish_piece(self, name: str, output: "RequestOutput") -> "Written | None":
        """One piece is finished; with the last one comes what all of them wrote."""
        session = self._sessions[name]
        session.num_unfinished -= 1
        if session.num_unfinished:
            return None
        self._at_rest[name] = None
        written = Written.of(output, session.num_outputs)
        session.num_outputs += len(written.tokens)
        before = session.num_pieces - 1  # each wrote one token
        tokens, logprobs = written.tokens[before:], written.logprobs[before:]
        session.read += tokens[:-1]
        scored = [asked for _, asked in written.logprobs[:before]]
        at_once = (self._scores or {}).pop(session.request_id, {})
        if any(position not in at_once for position in session.at_once):  # it was preempted, and another has the same text
            return replace(written, scored=None)
        return replace(written, tokens=tokens, logprobs=logprobs, scored=scored + [at_once[place] for place in session.at_once])

    def end(self, name: str) -> str:
        """Forget a text if it is here; its full blocks stay cached until others need them. Returns vLLM's name of the request."""
        self._at_rest.pop(name, None)
        if (session := self._sessions.pop(name, None)) is None:
            return ""
        self._engine.abort_request([session.request_id])
        (self._scores or {}).pop(session.request_id, None)
        return session.request_id

    def end_all(self) -> None:
        """Forget every text."""
        for name in list(self._sessions):
            self.end(name)

    def make_room(self, num_running: int) -> None:
        """End the texts that have rested longest while others wait for their place or their memory."""
        scheduler = self._scheduler
        while self._at_rest and (
            num_running + len(self._at_rest) > scheduler.max_num_running_reqs or scheduler.get_kv_cache_usage() > CROWDED
        ):
            self.end(next(iter(self._at_rest)))

    def give_way(self) -> None:
        """End the one that has rested longest where a step had nothing to compute though requests wait: for more memory than is
        free, which texts at rest would hold until they are continued, perhaps by an engine whose own texts wait for this one."""
        if self._at_rest and not self._scheduler.running:
            self.end(next(iter(self._at_rest)))

    @property
    def _scheduler(self) -> Any:
        """vLLM's, in this process."""
        client: Any = self._engine.engine_core
        return client.engine_core.scheduler

    def _join(self, pieces: Sequence[Piece]) -> tuple[Sequence[Piece], range]:
        """Without those whose work the last one does, and the positions that it scores for them."""
        if self._scores is None:
            return pieces, range(0)
        places = range(*(pieces[-1][1].extra_args or {})[SCORED])
        return [piece for piece in pieces if piece[0] not in places], places

    def _queue(self, request_id: str, tokens: list[int], params: "SamplingParams", salt: str) -> None:
        engine = self._engine
        tasks = engine.get_supported_tasks()
        request = engine.input_processor.process_inputs(request_id, prompt_of(tokens, salt), params, tasks, resumable=True)
        request.external_req_id = request_id
        # Both sides extend their list of the text; between processes they would be copies.
        for_output = copy(request)
        for_output.prompt_token_ids = list(tokens)
        engine.output_processor.add_request(for_output, None)
        engine.engine_core.add_request(request)
