"""The operators of the feedback pipeline, a file for each."""
