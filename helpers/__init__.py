"""What two or more lessons share. Each module imports only from those above it in the list of README.md."""

import sys

# Every command and notebook comes by here first, so this must run on an old Python too: no f-strings, no annotations.
if sys.version_info < (3, 11):  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write("error: The course needs Python 3.11 or newer and this is " + version + ": install a newer one.\n")
    sys.exit(2)
