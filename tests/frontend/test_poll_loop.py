"""The launcher's loop, with real descriptors: who is called, and who no longer."""

from __future__ import annotations

import os

from frontend.poll_loop import PollLoop


def ready_pipe() -> int:
    """The read end of a pipe that is readable for ever: nobody holds its write end."""
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def test_a_descriptor_that_is_opened_anew_in_a_turn_is_not_taken_for_its_predecessor() -> None:
    loop, called = PollLoop(), list[str]()
    first, second = sorted((ready_pipe(), ready_pipe()))

    def replace_second() -> None:
        called.append("first")
        loop.unwatch(first)
        loop.unwatch(second)
        os.close(second)
        assert os.pipe()[0] == second, "the kernel gives out the lowest number that is free"
        loop.watch(second, lambda: called.append("successor"))  # which has nothing to read

    loop.watch(first, replace_second)
    loop.watch(second, lambda: called.append("second"))
    loop.turn()
    assert called == ["first"]


def test_timers_are_called_when_they_are_due_and_in_order() -> None:
    loop, called = PollLoop(), list[str]()
    loop.after(0.002, lambda: called.append("later"))
    loop.after(0.001, lambda: called.append("sooner"))
    while len(called) < 2:
        loop.turn()
    assert called == ["sooner", "later"]
