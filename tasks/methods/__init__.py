"""Merge methods: pure functions on tensors, and what each method says of itself."""
