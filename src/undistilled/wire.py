"""Messages between our processes: MessagePack behind a key, checked against types, never pickle."""

from __future__ import annotations

import ctypes
import hmac
import json
import os
import signal
import sys
import tempfile
import threading
from typing import Any

import msgspec
import zmq

MAX_MESSAGE = 64 * 1024 * 1024  # bytes, where nothing says how large messages get
MAX_SOCKET_PATH = 80  # of the 107 characters that a local socket's name may have
PR_SET_PDEATHSIG = 1


class Wire:
    """Packs messages behind a key that only the two processes know; anything else reads as None."""

    def __init__(self, key: str, incoming: Any) -> None:
        self._key = key.encode()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def pack(self, message: msgspec.Struct) -> list[bytes]:
        return [self._key, self._encoder.encode(message)]

    def unpack(self, frames: list[bytes]) -> Any:
        """The message, or None where the frames are not one of ours."""
        if len(frames) != 2 or not hmac.compare_digest(frames[0], self._key):
            return None
        try:
            return self._decoder.decode(frames[1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None


def bounded(socket: Any, most: int = MAX_MESSAGE) -> None:
    """An inbox that keeps all messages of up to `most` bytes: libzmq closes a connection that sends more."""
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.MAXMSGSIZE, most)


def hidden(socket: Any, secret: bytes) -> None:
    """Encrypt what a socket that will be bound says over a network. Who does not know the public half of `secret`
    cannot begin to speak with it."""
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, secret)


def unveiled(socket: Any, public: str) -> None:
    """Let a socket that will connect speak with one that is `hidden`."""
    own, secret = zmq.curve_keypair()
    socket.set(zmq.CURVE_PUBLICKEY, own)
    socket.set(zmq.CURVE_SECRETKEY, secret)
    socket.set(zmq.CURVE_SERVERKEY, public.encode())


def private_directory() -> str:
    """A new directory for sockets that only this user can enter."""
    short = len(tempfile.gettempdir()) < MAX_SOCKET_PATH
    return tempfile.mkdtemp(prefix="undistilled-", dir=None if short else "/tmp")


def told() -> dict[str, Any]:
    """What the parent says in a line of JSON on standard input. Where that ends before the line does, the parent has
    ended, or was interrupted, and this process ends too."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        sys.exit(1)
    said: dict[str, Any] = json.loads(line)
    return said


def end_with_input() -> None:
    """End this process when its standard input does, which its parent holds open: a thread waits for that."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def die_with(parent: int) -> None:
    """On Linux the kernel ends this process when its parent ends, even where it was stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
