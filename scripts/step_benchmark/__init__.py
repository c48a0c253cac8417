"""What `scripts/benchmark_step.py` measures, one topic a file."""
