"""``python -m comfyui_psa.training`` is the command ``psa``; with a TOML file first, it is ``psa train``.

The second form is for launchers: ``accelerate launch -m comfyui_psa.training config.toml``.
"""

import sys

from .cli import main

if len(sys.argv) > 1 and (sys.argv[1].endswith(".toml") or sys.argv[1].startswith(("--set", "--dry-run"))):
    sys.argv.insert(1, "train")
main()
