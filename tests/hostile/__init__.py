"""Hostile input of every kind of file: each ends in one line and status 2, or is accepted, and harms nothing."""
