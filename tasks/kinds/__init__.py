"""Kinds of task: how a row becomes tensors, losses, records and scores."""
