"""Flower's records and messages as events."""
