"""
Trains an EmoShare model, from audio files to a complete Hugging Face model repository.

The embedded demo, on whatever this machine has:
    accelerate launch --config_file accelerate_config.yaml train.py
The paper's best system on ComParE 2023, on one GPU, on four, and on two machines with four each:
    accelerate launch train.py configs/compare2023_hubert_large.yaml --data_dir DIR
    accelerate launch --multi_gpu --num_processes 4 train.py configs/compare2023_hubert_large.yaml --data_dir DIR
    accelerate launch --multi_gpu --num_processes 8 --num_machines 2 --machine_rank R --main_process_ip HOST \
        --main_process_port 29500 train.py configs/compare2023_hubert_large.yaml --data_dir DIR
The same, published on the Hub:
    accelerate launch train.py configs/compare2023_hubert_large.yaml --data_dir DIR \
        --push_to_hub --hub_model_id ORG/NAME
On a copy of the corpus that is on the Hub:
    accelerate launch train.py configs/compare2023_hubert_large.yaml --dataset ORG/CORPUS
A corpus of your own, on two CPU processes:
    torchrun --nproc_per_node 2 train.py --dataset csv --data_dir DIR --backbone facebook/hubert-base-ls960

The steps of a run, in the order of `training/run.py`:
    start       processes, device, precision and seeds                              training/launch.py
    corpus      clips, shares and facts are loaded and checked                      dataset_script/
    model       untrained heads, around a backbone or on acoustic features          training/model.py
    features    the frozen part runs once over every clip; its output is stored     training/features.py
    training    heads side by side; each emotion keeps its own best devel epoch,
                or what --selection says; tuned layers train with them              training/trainer.py
    scores      devel and test are predicted, devel is scored with intervals        evaluation/
    files       model, card, figure, predictions; the results are written last      evaluation/
    controls    baselines to compare the scores with, on request                    evaluation/controls.py
    Hub         everything in one commit, on request                                repository_emoshare.py
"""

import sys

from emoshare.training.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
