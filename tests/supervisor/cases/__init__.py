"""Cases that run the whole stack: nginx in front, several nodes of each role, Redis, MongoDB's protocol, monitoring."""
