#!/usr/bin/env bash
# Makes docs/report.png from runs: four quickstart runs, one a precision, their report, a screenshot of its head.
#
#   bash scripts/picture.sh            # needs Chromium; three minutes on two cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) \
  || { echo "lit_glm: scripts/picture.sh: no Chromium here (Debian: apt-get install chromium)" >&2; exit 2; }
"$python" -m lit_glm.train -m experiment=quickstart precision=fp32,bf16,amp,fp16 hydra.sweep.dir=multirun/picture
"$python" -m lit_glm.report multirun/picture --format html --out multirun/picture/report
"$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,1700 \
  --screenshot="$PWD/docs/report.png" "file://$PWD/multirun/picture/report/report.en.html" >/dev/null 2>&1
echo "docs/report.png"
