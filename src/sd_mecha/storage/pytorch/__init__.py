"""PyTorch's own files, read without executing anything in them."""
