"""A client that reads slowly has taken something as soon as its kernel has, however long ours waits before it takes more from us."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from controller.http_server import waiting_bytes
from controller.stalled_clients import StalledClients

DEADLINE_S = 20.0
STALL_S = 4.0

Run = Callable[[Coroutine[None, None, None]], None]


async def still(transport: asyncio.Transport) -> int:
    """What waits once nothing moves any more."""
    before, same = -1, 0
    async with asyncio.timeout(DEADLINE_S):
        while same < 20:
            await asyncio.sleep(0.005)
            now = waiting_bytes(transport)
            before, same = now, same + 1 if now == before else 0
    return before


async def read_slowly() -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        client.setblocking(False)
        served, _ = listener.accept()
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, served)
        assert waiting_bytes(transport) == 0
        transport.write(bytes(4 * 2**20))
        waiting, buffered = await still(transport), transport.get_write_buffer_size()
        assert waiting > buffered > 0, "the kernel holds a part"
        clients = StalledClients[str](STALL_S)
        assert clients.look({"slow": waiting}, 0.0) == []
        async with asyncio.timeout(DEADLINE_S):
            while waiting_bytes(transport) == waiting:
                await loop.sock_recv(client, 1024)
        assert transport.get_write_buffer_size() == buffered, "our kernel has taken no more from us"
        assert clients.look({"slow": waiting_bytes(transport)}, STALL_S) == []
        left = await still(transport)
        clients.look({"slow": left}, 2 * STALL_S)
        assert clients.look({"slow": await still(transport)}, 3 * STALL_S) == ["slow"], "it has stopped"
        transport.abort()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_client_that_takes_what_our_kernel_holds_is_not_stalled(run: Run) -> None:
    run(read_slowly())
