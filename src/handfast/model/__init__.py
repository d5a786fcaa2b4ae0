"""The paper's claims, executable: processes, a search over all their states, and what it finds."""
