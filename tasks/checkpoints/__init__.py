"""Model files: tensors read lazily, checkpoints planned and written; needs no transformers."""
