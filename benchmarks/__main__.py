"""All benchmarks of minutes, one after the other: `python -m benchmarks`."""

from __future__ import annotations

import subprocess
import sys

for name in ("pesc_layer", "pesc_tuning", "soft_tuning"):
    print(f"== {name}", flush=True)
    if code := subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
        sys.exit(code)
