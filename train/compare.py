"""``ds-lvxattn compare``, from a checkout of the repository: python train/compare.py --help"""

import sys

from ds_lvxattn.training.compare.command import main

if __name__ == "__main__":
    sys.exit(main())
