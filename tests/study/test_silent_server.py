"""A PostgreSQL server that stays silent is an error, and not a wait without end."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from zofo.errors import UserError
from zofo.study import queue

GREETING = b"R\0\0\0\x08\0\0\0\0" + b"Z\0\0\0\x05I"  # authentication passed, ready for a query


@pytest.fixture(params=[b"", GREETING], ids=["at the connection", "at the first query"])
def silent_server(request):
    """The URL of a server that says no more than its greeting."""
    pytest.importorskip("psycopg")
    accepted = []

    def serve():
        while True:
            try:
                client, _ = listening.accept()
            except OSError:  # closed by the test
                return
            accepted.append(client)
            client.recv(4096)
            client.sendall(request.param)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        port = listening.getsockname()[1]
        yield f"postgresql://me:secret@127.0.0.1:{port}/db?sslmode=disable&gssencmode=disable"
        listening.shutdown(socket.SHUT_RDWR)
    for client in accepted:
        client.close()


def test_a_server_that_stays_silent(monkeypatch, silent_server):
    monkeypatch.setattr(queue, "_ANSWER_S", 2)  # libpq takes no shorter time for a connection
    began = time.monotonic()
    with pytest.raises(UserError, match=r"database postgresql://me@127.*(did not answer|timeout)"):
        queue.Queue(silent_server, "a study")
    assert time.monotonic() - began < 30
