"""Data plane: what workers do; importable and testable without Ray."""
