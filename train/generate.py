"""``ds-lvxattn generate``, from a checkout of the repository: deepspeed train/generate.py --help"""

import sys

from ds_lvxattn.training.generate import main

if __name__ == "__main__":
    sys.exit(main())
