"""The feedback pipeline: pure operators over the log, and what runs them."""
