#!/usr/bin/env bash
# The whole benchmark on generated data, on a machine with only Python and git. Further arguments are overrides.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup ""
exec .venv/bin/python -m lit_glm.train experiment=quickstart "$@"
