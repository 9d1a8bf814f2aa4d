"""`python -m lit_glm.report`."""

import sys

from lit_glm.report import main

sys.exit(main())
