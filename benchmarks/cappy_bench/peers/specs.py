"""Lists the runners: every tool, in the settings in which it is measured."""

from __future__ import annotations

from dataclasses import dataclass

OURS = "cappy"


@dataclass(frozen=True)
class Spec:
    """Describe a tool in one setting.

    `module` is a file of this package (a `.mjs` for Node) and `environment` the virtual environment that it runs in.
    `packages` must be installed there, and their versions are reported. `setting` is the report's text about it. `way`
    chooses one of the module's WAYS, if it has some.

        >>> Spec("torch", "pytorch", "fp32", "eager, SDPA", ("torch", "transformers")).is_ours
        False
    """

    name: str
    module: str
    precision: str
    setting: str
    packages: tuple[str, ...]
    environment: str = "main"
    way: str = ""

    @property
    def is_ours(self) -> bool:
        """True if this is the engine of this repository."""
        return self.module == OURS


SORTED = "pairs sorted by length, at most 512 tokens a batch (our planner)"
ENGINE = ("onnxruntime", "tokenizers")
TORCH = ("torch", "transformers")
OPTIMUM = ("optimum-onnx", "onnxruntime")
NODE = ("@huggingface/transformers", "onnxruntime-node")
SORTED_BY_TOOL = "identity activation, batches of 2 sorted by characters"
ENCODER = f"Encoder.forward_batch, which takes padding out, head in numpy; {SORTED}"
SIDE_BY_SIDE = "a batch for each thread, on one session"
OPTIMUMS = (
    ("", "fp32", "ORTModelForSequenceClassification, its own export at O2"),
    ("-int8", "int8", "ORTQuantizer's dynamic int8 for this CPU, per channel"),
)
"""Names, precisions and how they are made; each is measured with one batch at a time and with several."""
OPENVINO = (
    ("", "fp32", "optimum-intel's export, float32 forced", ()),
    ("-bf16", "bf16", "optimum-intel's export, the default precision of a CPU that has bfloat16", ()),
    (
        "-int8",
        "int8",
        "OVQuantizer's static int8, calibrated on 128 of the package's pairs, the rest by default",
        ("nncf",),
    ),
)
"""Names, precisions and how they are made; each is measured with one stream and with several."""

SPECS = (
    Spec("cappy", OURS, "fp32", "Scorer, default settings", ENGINE),
    Spec("cappy-fp16", OURS, "fp16", "Scorer, default settings", ENGINE),
    Spec("cappy-bf16", OURS, "bf16", "Scorer, default settings", ENGINE),
    Spec("cappy-int8", OURS, "int8", "Scorer, default settings", ENGINE),
    Spec("torch", "pytorch", "fp32", f"eager, SDPA; {SORTED}", TORCH, way="eager"),
    Spec("torch-compile", "pytorch", "fp32", f"inductor, dynamic shapes; {SORTED}", TORCH, way="compiled"),
    Spec("torch-bf16", "pytorch", "bf16", f"weights in bfloat16, eager, SDPA; {SORTED}", TORCH, way="eager"),
    Spec(
        "torch-compile-bf16",
        "pytorch",
        "bf16",
        f"weights in bfloat16, inductor, dynamic shapes; {SORTED}",
        TORCH,
        way="compiled",
    ),
    Spec(
        "torch-autocast-bf16",
        "pytorch",
        "bf16",
        f"weights in float32, autocast to bfloat16, eager, SDPA; {SORTED}",
        TORCH,
        way="autocast",
    ),
    Spec(
        "torch-padded",
        "pytorch",
        "fp32",
        "the authors' habit: every pair padded to 512, batches of 16",
        TORCH,
        way="padded",
    ),
    Spec(
        "sentence-transformers",
        "sentence_transformers_torch",
        "fp32",
        f"CrossEncoder.predict, {SORTED_BY_TOOL}",
        ("sentence-transformers", "torch"),
    ),
    Spec(
        "sentence-transformers-onnx",
        "sentence_transformers_onnx",
        "fp32",
        f"CrossEncoder.predict, its own ONNX export at O2, {SORTED_BY_TOOL}",
        ("sentence-transformers", *OPTIMUM),
    ),
    *(
        Spec(
            f"optimum{of}{streams}",
            "optimum_onnx",
            precision,
            f"{how}; {SIDE_BY_SIDE + '; ' if streams else ''}{SORTED}",
            OPTIMUM,
            way="streams" if streams else "one-batch",
        )
        for of, precision, how in OPTIMUMS
        for streams in ("", "-streams")
    ),
    Spec("ctranslate2", "ctranslate2", "fp32", ENCODER, ("ctranslate2",)),
    Spec("ctranslate2-int8", "ctranslate2", "int8", f"int8_float32, {ENCODER}", ("ctranslate2",)),
    Spec(
        "fastembed",
        "fastembed",
        "fp32",
        "TextCrossEncoder.rerank_pairs on optimum's export at O2, batches of 1",
        ("fastembed", "onnxruntime"),
    ),
    *(
        Spec(
            f"openvino{of}{streams}",
            "openvino",
            precision,
            f"{how}; {'one batch on all threads' if not streams else 'a stream and a batch for each thread'}; {SORTED}",
            ("openvino", "optimum-intel", *needs),
            environment="openvino",
            way="streams" if streams else "one-stream",
        )
        for of, precision, how, needs in OPENVINO
        for streams in ("", "-streams")
    ),
    *(
        Spec(
            name,
            "llama_cpp",
            precision,
            f"GGUF in {kind}, rank pooling, GELU by tanh, nothing padded; {SORTED}",
            ("llama-cpp-python", "gguf"),
            environment="llamacpp",
        )
        for name, precision, kind in (("llama.cpp-f16", "fp16", "F16"), ("llama.cpp-int8", "int8", "Q8_0"))
    ),
    Spec(
        "infinity",
        "infinity",
        "fp32",
        "AsyncEmbeddingEngine.rerank in process, torch engine, raw scores, its own queue in batches of 8",
        ("infinity-emb", "torch"),
        environment="infinity",
    ),
    Spec(
        "transformers.js",
        "transformersjs.mjs",
        "fp32",
        f"Node, optimum's export at O2, raw logits; {SORTED}",
        NODE,
        "node",
    ),
    Spec(
        "transformers.js-int8",
        "transformersjs.mjs",
        "int8",
        f"Node, optimum's dynamic int8 (dtype q8), raw logits; {SORTED}",
        NODE,
        environment="node",
    ),
)
