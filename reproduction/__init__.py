"""The parts of `reproduce.py`: a grid of training runs, and the tables and figures of their results."""
