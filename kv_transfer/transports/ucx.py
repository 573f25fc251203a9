"""Owns the ucx transport, over `ucxx` or, where that is absent, `ucp` (ucx-py). The only file that imports them."""


def is_available(profile: str) -> bool:
    """Not yet: the transport follows."""
    return False
