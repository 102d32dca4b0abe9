"""How cappy-mini, the small model in the package, was made; README.md has the commands.

It imports the exporter and the engine, and is measured by `cappy_bench.quality.held_out`, which imports it.
"""
