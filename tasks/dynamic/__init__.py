"""SE-Merging: base and task vectors as one network with coefficients for each sample."""
