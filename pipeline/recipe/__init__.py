"""What a recipe may say, and reading it; needs neither torch nor transformers."""
