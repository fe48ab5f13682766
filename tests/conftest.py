"""Settings that all tests share."""

from __future__ import annotations

import hypothesis

# How long one example takes says nothing on two cores that also run a server.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")
