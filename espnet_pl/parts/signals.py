"""How a training is told to stop, and how it says that all is saved; nothing slow to import."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
AGAIN = 75  # the exit code EX_TEMPFAIL: all is saved, the same command goes on
