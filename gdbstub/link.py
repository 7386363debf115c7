"""A client's socket beside its transport, for dialogues of small packets.

A debugger sends its next request as soon as it has the reply. Through an event loop that costs more than the request itself:
the reply leaves at the end of the loop's turn, the process sleeps, and is woken. So replies are sent at once, and for a
moment the next request is waited for without sleeping. How well that goes decides whether it is tried again.
"""

import os
import time
from asyncio import Transport

__all__ = ["Link"]

_PATIENCE = 0.0001
"""Seconds to wait for the next request: a few times what a client needs for it."""
_TURN = 0.002
"""Seconds after which others in the event loop have their turn."""
_MOST = 1 << 18
_LONGEST_REST = 1023


class Link:
    """Owns a second descriptor of the transport's socket, which does not block, until `close`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._descriptor = os.dup(transport.get_extra_info("socket").fileno())
        # After a failure the next few requests are not waited for; the more failures, the more.
        self._rest = self._penalty = 0

    def fileno(self) -> int:
        """The descriptor: readable when the client has sent something."""
        return self._descriptor

    def write(self, data: bytes) -> None:
        """Send, at once unless older data waits."""
        sent = 0
        if not self._transport.get_write_buffer_size():
            try:
                sent = os.write(self._descriptor, data)
            except OSError:  # full, or broken: the transport deals with it
                sent = 0
            if sent == len(data):
                return
        self._transport.write(data[sent:])

    def take(self) -> bytes:
        """What the client has sent; b"" if nothing."""
        try:
            return os.read(self._descriptor, _MOST)
        except OSError:
            return b""

    def turn_ends(self) -> float:
        """When a dialogue that begins now must return to the event loop, for `follow`."""
        return time.perf_counter() + _TURN

    def follow(self, turn_ends: float) -> bytes:
        """What the client sends within a moment; b"" if nothing, or if it closed the connection."""
        if self._rest:
            self._rest -= 1
            return b""
        until = min(time.perf_counter() + _PATIENCE, turn_ends)
        while True:
            try:
                data = os.read(self._descriptor, _MOST)
            except BlockingIOError:
                if time.perf_counter() < until:
                    os.sched_yield()  # to a client on the same processor
                    continue
                if until < turn_ends:
                    self._penalty = min(2 * self._penalty + 1, _LONGEST_REST)
                    self._rest = self._penalty
                return b""
            except OSError:
                return b""
            if data:
                self._penalty = 0
            return data

    def close(self) -> None:
        os.close(self._descriptor)
