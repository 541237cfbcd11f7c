"""Folders: where the testbed, what was computed, and what was downloaded are.

In the repository, which `make` installs in place. Installed from a wheel, the package is far from it: then in the
folder in which Python was started, such as a clone of the repository. DORI_TESTBED, DORI_CACHE, DORI_DATA and
DORI_FIGURES name other places.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "pyproject.toml").is_file():
    ROOT = Path.cwd()

TESTBED = Path(os.environ.get("DORI_TESTBED") or ROOT / "testbed")
