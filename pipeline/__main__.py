"""python -m pipeline."""

from sensmerge.pipeline.cli import main

main()
