"""``python -m ivshmem_lab`` is the command ``ivshmem-lab``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
