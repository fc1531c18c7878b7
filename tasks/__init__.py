"""Data plane: one module per stage, each a plain function that Ray runs on a worker."""
