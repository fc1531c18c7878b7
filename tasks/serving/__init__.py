"""Merged models that answer, in this process or behind MLflow."""
