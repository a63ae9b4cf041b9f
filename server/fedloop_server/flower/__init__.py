"""Flower over the event log: a grid that resumes, and what it lets through."""
