"""HOW one stage runs: reproduce it, plan the grid, share the machine, show it in Prefect's pages."""
