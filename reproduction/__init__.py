"""What `reproduce.py` is made of: a grid of training runs, and the tables and figures that are made of them."""
