"""Control plane: runs on the driver and moves no tensor."""
