"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# How long an example takes, to draw or to run, says something about the machine, not about the code; pytest's timeout ends what
# hangs. The same examples every time: a failure is of the change that it comes with.
settings.register_profile("pdserve", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pdserve")
