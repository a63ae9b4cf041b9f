"""What a model learns, and how one round learns it."""
