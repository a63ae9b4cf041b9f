"""What is made of many updates."""
