"""`python -m lit_glm.verify`."""

import sys

from lit_glm.verify import main

if __name__ == "__main__":
    sys.exit(main())
