"""A cluster whose nodes share nothing but a bucket, on one machine."""
