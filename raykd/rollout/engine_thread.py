"""A thread that owns one vLLM engine: requests stream in and are batched step by step, exclusive calls run between batches."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raykd.engine import STEPPING
from raykd.rollout.sessions import Piece, Scores, Sessions, Written, prompt_of

if TYPE_CHECKING:
    from vllm import LLMEngine


SLEEP_LEVEL = 1
"""vLLM's: weights wait in the machine's memory. Level 2 would forget them, and engines are also asked without an update before:
by held-out measures between steps, before the first step, as a teacher."""


@dataclass
class _Request:
    text: list[int]
    pieces: list[Piece]
    session: str | None
    wakes: bool = True
    future: "Future[Written]" = field(default_factory=Future)


@dataclass
class _Call:
    function: "Callable[[LLMEngine], Any]"
    fatal: bool
    exclusive: bool = True
    wakes: bool = True
    """An engine that sleeps."""
    future: Future[Any] = field(default_factory=Future)


class EngineThread:
    """Runs ``LLMEngine.step()`` while there are requests. An error of the engine reaches every caller, then and later."""

    def __init__(self, build: "Callable[[], tuple[LLMEngine, Scores | None]]") -> None:
        """``build``: makes the engine, and says where its sampler puts the scores of what it reads, if it does."""
        self._inbox: queue.SimpleQueue[_Request | _Call | None] = queue.SimpleQueue()
        self._backlog: deque[_Request | _Call] = deque()
        self._running: dict[str, _Request] = {}
        self._num_requests = 0
        self._num_updates = 0
        self._failure: BaseException | None = None
        self._sleeping = False
        self._closing = threading.Lock()
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, ready), name="vllm-engine", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, text: list[int], pieces: list[Piece], session: str | None = None) -> Future[Written]:
        """Queue a request, several pieces of it for a session; cancelling the future aborts it, and ends the session."""
        assert session is not None or len(pieces) == 1, "only a session has several pieces"
        return self._put(_Request(text, pieces, session))

    def end_session(self, name: str) -> Future[None]:
        """Forget a resident text."""
        return self._put(_Call(lambda _: self._drop(name), fatal=False, exclusive=False, wakes=False))

    def exclusive(self, function: "Callable[[LLMEngine], Any]") -> Future[Any]:
        """Run a function once the requests queued before it are answered and before those queued after it begin.

        No text is resident then.
        """
        return self._put(_Call(function, fatal=False))

    def update(self, function: "Callable[[LLMEngine], Any]", *, in_flight: bool) -> Future[Any]:
        """Run a function that replaces the weights: ``exclusive``, or between two steps of the requests that are running.

        Those go on with the keys and values that they have; requests that begin later share none of them. An error in it leaves
        the engine unusable.
        """

        def updated(engine: "LLMEngine") -> None:
            function(engine)
            self._num_updates += 1

        return self._put(_Call(updated, fatal=True, exclusive=not in_flight))

    def sleep(self) -> Future[None]:
        """Give the GPU memory of weights and KV cache back, once the requests queued before are answered.

        Whatever is asked next first wakes the engine, which has the same weights then and no text.
        """
        return self._put(_Call(self._fall_asleep, fatal=True, wakes=False))

    def close(self) -> None:
        """Stop the engine; callers still waiting get an error."""
        self._inbox.put(None)
        self._thread.join()

    def _put(self, item: _Request | _Call) -> Future[Any]:
        with self._closing:
            if self._failure is not None:
                raise RuntimeError(f"the vLLM engine has stopped ({self._failure}); start a new one") from self._failure
            self._inbox.put(item)
        return item.future

    def _run(self, build: "Callable[[], tuple[LLMEngine, Scores | None]]", ready: Future[None]) -> None:
        try:
            with STEPPING:
                engine, scores = build()
                self._sessions = Sessions(engine, scores)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        failure: BaseException = RuntimeError("it was closed")
        try:
            while self._receive():
                with STEPPING:
                    self._admit(engine)
                    outputs = engine.step() if self._running else []
                    if self._running and not outputs:
                        self._sessions.give_way()
                self._deliver(outputs)
        except BaseException as error:  # whatever ends this thread, no caller may wait for ever
            failure = error
        self._fail(failure)
        with STEPPING:
            engine.engine_core.shutdown()

    def _receive(self) -> bool:
        """Move what has arrived to the backlog, waiting when there is nothing else to do; False to stop."""
        while True:
            try:
                item = self._inbox.get(block=not (self._running or self._backlog))
            except queue.Empty:
                return True
            if item is None:
                return False
            self._backlog.append(item)

    def _admit(self, engine: "LLMEngine") -> None:
        for name in [name for name, request in self._running.items() if request.future.cancelled()]:
            session = self._running.pop(name).session
            engine.abort_request([name]) if session is None else self._sessions.end(session)
        while self._backlog:
            item = self._backlog[0]
            if isinstance(item, _Call) and item.exclusive and self._running:
                break
            if self._sleeping and item.wakes:
                engine.wake_up()
                self._sleeping = False
            self._backlog.popleft()
            if isinstance(item, _Call):
                self._call(engine, item)
            elif not item.future.cancelled():
                self._begin(engine, item)
        self._sessions.make_room(len(self._running))

    def _call(self, engine: "LLMEngine", call: _Call) -> None:
        try:
            if call.exclusive:
                self._sessions.end_all()
            result = call.function(engine)
        except Exception as error:
            _answer(call.future, error)
            if call.fatal:
                raise
        else:
            _answer(call.future, result)

    def _fall_asleep(self, engine: "LLMEngine") -> None:
        if self._sleeping:
            return
        if not engine.reset_prefix_cache():
            raise RuntimeError("vLLM cannot forget its KV cache before it sleeps: some of it is in use though nothing is asked")
        engine.sleep(SLEEP_LEVEL)
        self._sleeping = True

    def _begin(self, engine: "LLMEngine", request: _Request) -> None:
        from vllm.exceptions import VLLMClientError

        try:
            if request.session is not None:
                if not self._sessions.rests(request.session):
                    self._drop(request.session)  # its caller has given up a call that is still under way
                name = self._sessions.resume(request.session, request.text, request.pieces, self._salt)
            else:
                self._num_requests += 1
                name = str(self._num_requests)
                engine.add_request(name, prompt_of(request.text, self._salt), request.pieces[0][1])
        except (ValueError, VLLMClientError) as error:  # this request is at fault, not the engine
            if request.session is not None:
                self._sessions.end(request.session)
            _answer(request.future, error)
        else:
            self._running[name] = request

    @property
    def _salt(self) -> str:
        """What tells the keys and values of these weights from those of others in vLLM's prefix cache."""
        return str(self._num_updates)

    def _drop(self, session: str) -> None:
        name = self._sessions.end(session)
        if (request := self._running.pop(name, None)) is not None:
            request.future.cancel()

    def _deliver(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            session = self._running[output.request_id].session
            written = Written.of(output) if session is None else self._sessions.finish_piece(session, output)
            if written is None:
                continue
            request = self._running.pop(output.request_id)
            if written.scored is None:
                self._backlog.appendleft(request)  # the text is read anew, and scored piece by piece
            else:
                _answer(request.future, written)

    def _fail(self, error: BaseException) -> None:
        with self._closing:
            self._failure = error
        while not self._inbox.empty():
            self._receive()
        for item in [*self._running.values(), *self._backlog]:
            _answer(item.future, RuntimeError(f"the vLLM engine has stopped: {error}"))


def _answer(future: Future[Any], result: Any) -> None:
    """Complete a future with a value or an error, unless its caller has given up."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
