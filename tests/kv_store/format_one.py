"""Owns what a store of format 1 left behind, before pages carried their tokens: a disk tier's directory, and a value in Redis.

Written by that version: pages 0 to 4 of `tests.kv_store.chains`, with SMALL as it was, every byte of page n being n + 1.
"""

from __future__ import annotations

import base64
import io
import lzma
import tarfile
from pathlib import Path

DIGEST = "db4ad25c23d1ca6818d3a2da2c0a1bd1"  # of SMALL, in that format
PAGES = 5
_DISK = (
    "/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4T//A1tdADIYgoRx4+5mmxsO7SlDu57HcAIl7S5ajzNqkpkrxuYAlPK/K6NVm9yK6NmDYwbi8ZuPA94cxZlNlahF"
    "724baP4d+ZvCbG28omLhISajKQT4ucVcXfl0pItS7jIR55Jy4VDe6n0iWZaTLHi+v8oue/p/Ry3UwxFFqOr5Fb5CBGQNgsVP74LYLZDOfjVyDTmAZjXW13Px"
    "CIVbmnlRLKXUUFfKlJnkhmbaNV/X7RSVS1ass0bTj3KpAjrR4h4wNdilPf51eCcETJg5ODaQD/UBvprDU7U35Dsd2XLOtRW5adG98i2qk059ndyUtRcy+PZW"
    "076FdPB967v/4GB4mRScMGKVw2fsP73UeHcZz6KWY+5JfH3WOtjvPRt2bwjJoawgxSRoWcK6mkz1K0+2Q8+nr4qhvpy+28DcA9gvnqGSJ2yh1Sgg1fzjzC0x"
    "M6NqEBIsTq4fD+WGlXqyZR9k/+y8WApCv5BDdwfSu/wlcoHS5hPxwBHOsnUioVKQdkj3Sl6ZnEmIDYxG5c3WtlQNstrRCckut5TmiGeA97oZAgxUFLRj2qJx"
    "Oik6po1Iz7QmwPfIuqHCjUW1dEn/SDa4Aen2zlWCGF2AOpWfWnNLEQ/k2n5r+fu59GlHBSWIbIXXpZ8oDoovJ1P0fx72oMiYJCUALqtjTihsscxaStMku/Dp"
    "groLglu36Y0n8VtMhZMfdlrpDJIscBiRpRkdR8NxVfmFoyutMdkODsKNrDOIg6uxw18hGNXfWaWBR0z6Lna2imrnAu7E7jvyZ8ZsxqmeZXf4xHt1D5zwK610"
    "MleBodV+U0+W36fWoR67xTZFhUJd5L5KjRneWnacIwoZBPPfvcmD/qsQ/+f+vOpMqRq2L8RyOlmstH2KxI2RUITLE+p2ycyaYKTgGBmJM1JrYTiaR1uLrj0V"
    "wc0tC8Z/6U47AnG+4aPCpEo8IE16rC5Yflu4lGKyDcdYIbTxESrg88caNG4IiU0WLGpMFXF6CqylrdOmjcn/FrD702DJlmP+Z/N1AVeO3f99YsBeumkb6kPY"
    "yHcIZQTI9zZMVWz9eOTt/CA4PafXdkuPDDNQ6T816pUZZgANC67EENbaRiVT0kNUVhsNyhz6DxwtIV9yz/5WyOF4baB9PV55yHQNe6FSpAAAAMme7R44aOke"
    "AAH3BoCABQAiUZk1scRn+wIAAAAABFla"
)
_REDIS_VALUE = (
    "/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4AhpAHVdADgZCs1nv0j9fei8CoEWog4KhHxGB5L3zxuPGtY501m6WpwTx4fWr+4mOTd+jrwGq9J3llPV5kF+UzGZ"
    "sTMM7YheXdUslHlGMRpzjwkz4QOoUmsxppQ9GO1BHY5qoXyx2iBy5qbg/EsNmg0TroBTm7I9Dp0rAAAAAAA0ROVmV8JxEgABkQHqEAAApzrrjbHEZ/sCAAAA"
    "AARZWg=="
)


def unpack_disk(into: Path) -> None:
    """Two segments of four slots, which need 275,000 bytes, and their index."""
    with tarfile.open(fileobj=io.BytesIO(_raw(_DISK))) as files:
        files.extractall(into, filter="data")


def redis_value() -> bytes:
    """Page 0."""
    return _raw(_REDIS_VALUE)


def _raw(packed: str) -> bytes:
    return lzma.decompress(base64.b64decode(packed))
