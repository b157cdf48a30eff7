"""
Reproduces the paper: trains a grid of features, architectures and seeds, and makes tables and figures.

With the data of the ComParE 2023 challenge, on one GPU and on four:
    accelerate launch reproduce.py --config configs/paper_grid.yaml --data_dir DIR
    accelerate launch --multi_gpu --num_processes 4 reproduce.py --config configs/paper_grid.yaml --data_dir DIR
Without any data, on the synthetic corpus with small random backbones:
    accelerate launch reproduce.py --config configs/synthetic_grid.yaml

`reproduction/run.py` has the steps, `python reproduce.py --help` the flags.
"""

import sys

from emoshare.reproduction.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
