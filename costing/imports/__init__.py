"""What others measured end to end, as records: benchmark results of serving tools, and their price beside kernels'."""
