"""Start the command line: python -m editcore."""

import signal
import sys

from editcore import cli

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, cli.end_politely)
    sys.exit(cli.main())
