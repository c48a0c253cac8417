"""`hf-sage train` as a script, for launchers.

python scripts/train.py --dataset style_digits --held_out sketch --output_dir out --max_steps 200
accelerate launch --multi_gpu --num_processes 2 scripts/train.py --held_out sketch --output_dir out
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 scripts/train.py --held_out sketch ...
"""

import sys

from hf_sage.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
