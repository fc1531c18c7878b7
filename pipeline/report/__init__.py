"""The results of a run: scores, tables, pictures, model card, and the gate."""
