"""For all tests: examples are the same in every run, and pytest told to leave by SIGTERM cleans up as after Ctrl-C."""

import signal

from hypothesis import settings

settings.load_profile("ci")  # no deadlines either: processors here may be busy
signal.signal(signal.SIGTERM, signal.default_int_handler)
