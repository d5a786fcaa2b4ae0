"""What the questions share: states, peers, limits, contests, jobs, and how figures are shown."""
