"""What streamed reductions ask about a whole tensor while its tiles pass by."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from sd_mecha.execution.lane import settle
from sd_mecha.extensions.reductions import State, as_tuple


class Questions:
    """The answers that one streamed call has had so far, and the states of those being worked on."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.states: list[State] | None = None
        self.single = True
        self.complete = False  # with these answers the method returns
        self.lock = threading.Lock()

    def ask(self, request: Any, start: int, numel: int) -> None:
        """Take one tile of what the method yields."""
        reductions, single = as_tuple(request)
        with self.lock:
            if self.states is None:
                self.states, self.single = [r.state(numel) for r in reductions], single
                settle()
        for reduction, state in zip(reductions, self.states, strict=True):
            if not isinstance(state, Known):
                state.add(reduction, start)

    def conclude(self) -> None:
        """All tiles were seen: settle what can be settled."""
        if self.states is None:
            return
        for i, state in enumerate(self.states):
            if not isinstance(state, Known) and (answer := state.finish()) is not None:
                self.states[i] = Known(answer)
        known = [s.answer for s in self.states if isinstance(s, Known)]
        if len(known) == len(self.states):
            self.answers.append(known[0] if self.single else tuple(known))
            self.states = None


class Known(State):
    def __init__(self, answer: Tensor) -> None:
        self.answer = answer

    def add(self, reduction: Any, start: int) -> None: ...

    def finish(self) -> Tensor:
        return self.answer


class Dry(Questions):
    """Looks whether a method is satisfied, without taking anything in."""

    def __init__(self, question: Questions) -> None:
        super().__init__()
        self.answers = question.answers

    def ask(self, request: Any, start: int, numel: int) -> None: ...
