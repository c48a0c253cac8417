"""`hf-sage benchmark` as a script.

python scripts/benchmark.py --dataset style_digits --methods erm sam sage --seeds 2 --output-dir benchmark
python scripts/benchmark.py scripts/configs/table1.yaml --output-dir benchmark
python scripts/benchmark.py resume benchmark --launch "--config_file scripts/accelerate/ddp.yaml"
"""

import sys

from hf_sage.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
