"""How cappy-mini, the small model in the package, was made; README.md has the commands.

It imports the exporter and the engine, and is measured by `cappy_bench.quality.held_out`, which imports it.
"""

import cappy_engine  # noqa: F401  (first, as it keeps ONNX Runtime's telemetry off)
