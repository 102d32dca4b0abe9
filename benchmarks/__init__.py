"""What measures: `cappy_bench`, which is installed with the package, and `micro`, which pytest-benchmark runs."""
