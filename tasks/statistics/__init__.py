"""What is accumulated over an expert's calibration set; one module per statistic."""
