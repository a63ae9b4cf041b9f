"""What the tasks' models share: the base's folder, the tensors of a release, and what is kept of the frozen part."""
