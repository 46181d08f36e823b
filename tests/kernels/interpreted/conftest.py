"""Cases that run the Triton kernels on the CPU, collected only where `TRITON_INTERPRET=1` is set.

The interpreter is chosen when the kernels are imported and excludes ahead-of-time compilation, so these cases
need a pytest of their own.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
