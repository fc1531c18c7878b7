"""Mathematics that methods share: pure functions on tensors, piece by piece."""
