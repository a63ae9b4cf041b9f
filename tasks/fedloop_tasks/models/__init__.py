"""Base models that generate text: made once from what was downloaded, into a folder that every party checks by its hash."""
