"""Entry of `python -m lit_glm.plan`."""

import sys

from lit_glm.plan import main

if __name__ == "__main__":
    sys.exit(main())
