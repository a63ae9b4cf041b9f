"""Base models: made once into a folder that every party checks by its hash, found, loaded, and what the tasks' models share."""
