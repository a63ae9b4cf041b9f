"""Rounds from request to release: what the server does next, and how it does it."""
