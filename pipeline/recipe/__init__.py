"""The schema of recipes, and how they are read; needs neither torch nor transformers."""
