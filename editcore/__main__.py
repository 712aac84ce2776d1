"""Start the command line: python -m editcore."""

import signal
import sys

from editcore import cli

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, cli.end_politely)
    sys.exit(cli.main())
