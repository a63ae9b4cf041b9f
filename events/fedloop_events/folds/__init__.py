"""States as folds over the log, and the reader that keeps one up to date."""
