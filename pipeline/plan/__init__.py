"""From a recipe to steps: models and data resolved and checked, what each step reads, what is to run."""
