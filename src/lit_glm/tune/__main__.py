"""Entry of `python -m lit_glm.tune`."""

import sys

from lit_glm.tune import main

if __name__ == "__main__":
    sys.exit(main())
