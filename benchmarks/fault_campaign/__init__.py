"""What `benchmarks/faults.py` is made of: kills, interrupted writes, fuzzed inputs, and a Hub that fails."""
