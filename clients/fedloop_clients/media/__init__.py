"""What users say, show and film about a response: it becomes text on the device, and is kept nowhere else."""
