"""Checkpoints, adapters and networks."""
