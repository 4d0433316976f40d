"""Settings that the tests and the docstrings' examples share."""

import os

# Several test processes run side by side on tensors that are too small to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")
