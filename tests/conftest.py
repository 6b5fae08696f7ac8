"""pytest that is told to leave by SIGTERM cleans up as it does after Ctrl-C: daemons, namespaces, jobs."""

import signal

signal.signal(signal.SIGTERM, signal.default_int_handler)
