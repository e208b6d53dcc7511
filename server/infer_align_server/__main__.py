"""`python -m infer_align_server` is the command `infer-align`."""

import sys

from infer_align_server.cli import main

sys.exit(main())
