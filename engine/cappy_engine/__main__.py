"""`python -m cappy_engine` is `cappy`."""

import sys

from cappy_engine.cli.main import main

sys.exit(main())
