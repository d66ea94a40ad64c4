"""What two or more lessons share. Each module imports only from those above it in the list of README.md."""

import os
import sys

# Every command and notebook comes by here first, so this must run on an old Python too: no f-strings, no annotations.
if sys.version_info < (3, 11):  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stderr.write("error: The course needs Python 3.11 or newer and this is " + version + ": install a newer one.\n")
    sys.exit(2)

# PyTorch on a GPU then keeps free memory in pages and not in pieces, so that lessons of many batch lengths fit a T4. It
# reads this when it first uses the GPU.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
