"""Settings that the tests and the docstrings' examples share."""

import os
import signal

from hypothesis import settings

# A program, which a test runs: not to be imported in search of docstrings.
collect_ignore = ["tests/other_project/either_lightning.py"]
# Several test processes run side by side on tensors that are too small to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C, and so would what tests start, some of which are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes then says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
