"""How one round learns: what a device computes, what it uploads, and what becomes of all that."""
