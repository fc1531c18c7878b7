"""Running steps: the only room of this floor that imports Ray."""
