"""What a deployment stands on, made for one machine or a test bed: certificates, and what Docker Compose needs."""
