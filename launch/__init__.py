"""Where and how the recipe runs: the environment, local runs, clusters."""
