"""Rows of data sets, as their files have them."""
