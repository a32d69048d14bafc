"""`python -m zimage_fp8` is the command line."""

from zimage_fp8.cli import main

main()
