"""For all tests: examples are the same in every run, and pytest told to leave by SIGTERM cleans up
as after Ctrl-C.

A shell's background jobs ignore SIGINT, and so would the programs that tests interrupt: here it is
heeded.
"""

import signal

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.runs", "tests.faults")  # failing asserts show values
settings.load_profile("ci")  # no deadlines either: processors here may be busy
signal.signal(signal.SIGTERM, signal.default_int_handler)
signal.signal(signal.SIGINT, signal.default_int_handler)
