"""Checks of a log's integrity, by anybody who has the log: `log.verify`."""
