"""``python -m comfyui_psa.training`` is the command ``psa``."""

from .cli import main

main()
