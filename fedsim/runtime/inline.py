"""Everything in this process: the readable twin of the Ray runtime, and the one to debug with."""

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fedsim.core.interrupts import interruptible
from fedsim.core.numerics import NATIVE, check, use
from fedsim.runtime.answering import answered
from fedsim.runtime.base import PLAIN, Call, Fold, Policy, Resources, Runtime, Watch, chunks, pin_threads


class InlineCall(Call):
    def __init__(self, participants: Mapping[int, Any], chunk: int) -> None:
        super().__init__()
        self.participants, self.chunk = participants, chunk
        self.watch: Watch | None = None

    def __call__(
        self,
        method: str,
        round: int,
        payloads: Mapping[int, Any],
        fold: Fold | None = None,
        policy: Policy = PLAIN,
    ) -> Iterator[Any]:
        self.progress = (method, 0, len(payloads))
        for ids in chunks(list(payloads), self.chunk):
            chosen = {id_: payloads[id_] for id_ in ids}
            answer = answered(self.participants, method, round, chosen, fold, policy, done=self._one_done)
            self.note(method, answer, 0, ids, host=0, node=socket.gethostname())
            yield answer.content

    def _one_done(self) -> None:
        method, done, total = self.progress
        self.progress = (method, done + 1, total)
        if self.watch is not None:
            self.watch(*self.progress)


class InlineRuntime(Runtime):
    """One thread, no other process. `ask` returns when the aggregator does."""

    def __init__(self, numerics: str = NATIVE) -> None:
        use(numerics)
        check(numerics)
        self.numerics, self.threads = numerics, pin_threads()

    def start(
        self,
        make_aggregator: Callable[[Call], Any],
        make_participants: Mapping[int, Callable[[], Any]],
        resources: Mapping[int, Resources],
        chunk: int,
    ) -> None:
        self.call = InlineCall({id_: make() for id_, make in make_participants.items()}, chunk)
        self.aggregator = make_aggregator(self.call)

    def probe(self, call: Callable[[], Any]) -> Any:
        return call() if torch.cuda.is_available() else None

    def ask(self, method: str, *args: Any, watch: Watch | None = None) -> Any:
        self.call.watch = watch
        with interruptible():
            return getattr(self.aggregator, method)(*args)

    def close(self) -> None:
        torch.set_num_threads(self.threads)
