"""Tools that make workloads and measure; nothing here is installed with the package."""
