"""`python -m ds_lightning` is `ds-lightning`."""

import sys

from ds_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
