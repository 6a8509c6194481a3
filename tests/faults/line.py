"""A TCP line to a server that a test can cut and mend: to its clients the server is gone, and back, with its data."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class Line:
    """Listens on a port of its own, `endpoint`, and passes bytes to and from `host:port`, until it is cut."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._address = ("127.0.0.1", 0)
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self.mend()
        self.endpoint = f"http://127.0.0.1:{self._address[1]}"

    def mend(self) -> None:
        """Listen, on the same port every time."""
        listener = socket.create_server(self._address)
        self._address = listener.getsockname()
        self._sockets = [listener]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """End every connection and refuse new ones."""
        with self._lock:
            for end in self._sockets:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._sockets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
                with self._lock:
                    if listener not in self._sockets:
                        client.close()
                        server.close()
                        return
                    self._sockets += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
