"""Networks of transformers: names, experts, adapters, blocks, and running them in parts."""
