"""`python -m lit_glm.doctor`."""

import sys

from lit_glm.doctor import main

sys.exit(main())
