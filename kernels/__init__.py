"""Number formats and kernels. Knows tensors; knows no model, GPU name, clock or price."""
