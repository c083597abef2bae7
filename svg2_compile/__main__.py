"""``python -m svg2_compile`` is the command ``svg2``."""

from svg2_compile.cli import main

main()
