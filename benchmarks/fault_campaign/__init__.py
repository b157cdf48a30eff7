"""The parts of `benchmarks/faults.py`: kills, interrupted writes, fuzzed inputs, and a Hub that fails."""
