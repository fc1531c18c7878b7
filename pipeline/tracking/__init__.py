"""Runs, models and versions in MLflow: the only room that imports it."""
