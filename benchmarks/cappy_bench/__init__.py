import cappy_engine  # noqa: F401  (first, as it keeps ONNX Runtime's telemetry off)
