"""Programs that nobody has read, run apart from everything else and judged by tests."""
