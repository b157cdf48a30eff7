"""What `train.py` is made of: arguments, launch, feature store, training of the heads, evaluation, controls."""
