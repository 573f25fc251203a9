"""What holds for all tests."""

from hypothesis import settings

# How long an example takes says something about the machine, not about the code; pytest's timeout ends what hangs.
settings.register_profile("pdserve", deadline=None)
settings.load_profile("pdserve")
