"""Differential privacy: mechanisms, their noise, what they cost together, and who has spent what."""
