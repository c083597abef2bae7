"""Tests see the installed package: the repository root, where `kernels` is our folder, must not be importable.

Test modules can be imported by others, which test the same cases.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != TESTS.parent]
sys.path.append(str(TESTS))
