"""Settings that the tests and the docstrings' examples share."""

import os

from hypothesis import settings

# Several test processes run side by side on tensors that are too small to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes then says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
