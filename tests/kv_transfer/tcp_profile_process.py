"""Owns the checks of UCX's profile tcp, in a process of its own: a process has one profile. Argument: a seed. Prints "ok"."""

from __future__ import annotations

import asyncio
import random
import secrets
import sys

from kv_transfer.transport import Connection, Transport
from kv_transfer.transports import open_transport
from pdserve.errors import TransferFailed
from service_kit.config import TransferConfig

CONFIG = TransferConfig.model_validate({"connect_s": 30.0, "profile": "tcp"})
DEADLINE_S = 60.0
MESSAGES = 12
ROUNDS = 6
MESSAGE_BYTES = 2**20
OTHERS = 0x55  # what the next owner of a block writes there


async def connect(listening: Transport, connecting: Transport) -> list[tuple[Connection, Connection]]:
    """ROUNDS + 1 connections, both ends of each."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()

    async def on_connection(connection: Connection, hello: bytes) -> None:
        accepted.put_nowait(connection)

    address = await listening.listen(on_connection)
    pairs = []
    for _ in range(ROUNDS + 1):
        here = await connecting.connect(address, secrets.token_bytes(16), CONFIG.connect_s)
        pairs.append((here, await accepted.get()))
    return pairs


async def all_arrive(sender: Connection, receiver: Connection, source: random.Random) -> None:
    """Both ways at once, in another order than they are awaited."""
    data = [source.randbytes(source.randrange(1, MESSAGE_BYTES)) for _ in range(MESSAGES)]
    buffers = [bytearray(len(message)) for message in data]
    sends, receives = [], []
    for tag, (message, buffer) in enumerate(zip(data, buffers, strict=True)):
        there, back = (sender, receiver) if tag % 3 else (receiver, sender)
        sends.append(there.send(tag, memoryview(message)))
        receives.append(back.recv(tag, memoryview(buffer)))
    source.shuffle(receives)
    await asyncio.gather(*sends, *receives)
    assert buffers == [bytearray(message) for message in data]


async def nothing_is_written_after_giving_up(sender: Connection, receiver: Connection, source: random.Random) -> None:
    """The connection ends and its receives are cancelled somewhere inside; their memory goes to others as each ends."""
    data = bytes(MESSAGE_BYTES)
    buffers = [bytearray(b"\x11" * MESSAGE_BYTES) for _ in range(MESSAGES)]
    sends = [asyncio.ensure_future(sender.send(tag, memoryview(data))) for tag in range(MESSAGES)]
    given_up: list[bytearray] = []

    async def receive(tag: int) -> None:
        try:
            await receiver.recv(tag, memoryview(buffers[tag]))
        except (TransferFailed, asyncio.CancelledError):
            buffers[tag][:] = bytes((OTHERS,)) * MESSAGE_BYTES
            given_up.append(buffers[tag])

    receives = [asyncio.ensure_future(receive(tag)) for tag in range(MESSAGES)]
    for _ in range(source.randrange(40)):  # turns of the loop: somewhere inside the transfer
        await asyncio.sleep(0)
    await receiver.close()
    for task in receives:
        task.cancel()
    await asyncio.gather(*receives, return_exceptions=True)
    await asyncio.gather(*sends, return_exceptions=True)
    await sender.close()
    assert all(set(buffer) == {OTHERS} for buffer in given_up)


async def main(seed: int) -> None:
    source = random.Random(seed)
    listening, connecting = (open_transport("ucx", CONFIG, "127.0.0.1") for _ in range(2))
    async with asyncio.timeout(DEADLINE_S):
        first, *others = await connect(listening, connecting)
        for pair in others:
            await nothing_is_written_after_giving_up(*pair, source)
        await all_arrive(*first, source)  # its neighbours' end is not its own
    await connecting.close()
    await listening.close()
    sys.stdout.write("ok\n")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
