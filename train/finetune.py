"""``ds-lvxattn finetune``, from a checkout of the repository: deepspeed train/finetune.py --help"""

import sys

from ds_lvxattn.training.finetune import main

if __name__ == "__main__":
    sys.exit(main())
