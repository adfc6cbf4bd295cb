"""The scripts in `tools/` import each other by bare name, as a script does; here their folder is put on the path."""

from __future__ import annotations

import sys
from pathlib import Path

TOOLS = str(Path(__file__).resolve().parents[3] / "tools")
if TOOLS not in sys.path:
    sys.path.append(TOOLS)
