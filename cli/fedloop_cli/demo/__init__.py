"""`fedloop demo`: a whole deployment on this machine, each device and the server a process of its own, with invented users."""
