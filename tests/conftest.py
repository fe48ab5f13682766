"""Settings that all tests share."""

from __future__ import annotations

import signal

import hypothesis

# How long one example takes says nothing on two cores that also run a server.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

# A shell starts what it puts into the background with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
