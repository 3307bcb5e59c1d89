"""Settings of all tests."""

from hypothesis import settings

# A machine that does other work too may stop a test for any time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
