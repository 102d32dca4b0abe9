"""Say what the processor offers a scorer: cores, instruction sets, and which precision they make fast."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cappy_engine.cpu.cores import cpu_flags, cpu_name, quota_cores, usable_cores

INSTRUCTION_SETS: Mapping[str, str] = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bf16",
    "asimddp": "ARM dot product",
    "i8mm": "ARM int8 matrices",
}
"""Those that decide how fast a matrix product is: Linux's name, and what people call it."""
MULTIPLY_INT8 = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
"""With one of these, 8-bit products cost a fraction of those in float32."""
AMX_IS_HIDDEN = "AMX           hidden by this virtual machine; int8 and bf16 are faster in one that shows it"


@dataclass(frozen=True)
class Processor:
    """What this process may use: `cores` are the threads of a scorer by default, `cpus` what the system counts.

    `quota` is the container's limit in CPUs; `flags` are instruction sets by Linux's names, empty where unknown.
    """

    name: str
    cores: int
    cpus: int
    quota: float | None
    flags: frozenset[str]


def read_processor() -> Processor:
    """Read what the system tells of the processor.

    >>> read_processor().cores
    2
    """
    return Processor(cpu_name(), usable_cores(), os.cpu_count() or 1, quota_cores(), cpu_flags())


def describe_processor(processor: Processor) -> str:
    """Describe the processor, and say which precision is fastest on it.

    >>> print(describe_processor(read_processor()))
    """
    found = [text for flag, text in INSTRUCTION_SETS.items() if flag in processor.flags]
    limit = "" if processor.quota is None else f", limited to {processor.quota:g} CPUs by its container"
    return "\n".join(
        [
            f"CPU           {processor.name}",
            f"cores         {processor.cores} usable of {processor.cpus} CPUs{limit}",
            f"instructions  {', '.join(found) or 'none known that matter here'}",
            *([AMX_IS_HIDDEN] if is_amx_hidden(processor) else []),
            f"fastest       {_advice(processor.flags)}; 'cappy tune' measures the best mode",
        ]
    )


def is_amx_hidden(processor: Processor) -> bool:
    """Tell if a virtual machine hides the processor's AMX.

    >>> is_amx_hidden(read_processor())
    False

    AMX has the processor's fastest instructions for int8 and bf16. Intel's processors for servers have it since
    Sapphire Rapids, which was the first with AVX512-FP16.
    """
    is_made_for_amx = processor.name.startswith("Intel") and {"avx512_fp16", "hypervisor"} <= processor.flags
    return is_made_for_amx and "amx_int8" not in processor.flags


def _advice(flags: frozenset[str]) -> str:
    """Say what is fastest, with what docs/benchmarks.md measured."""
    if flags & MULTIPLY_INT8:
        return "int8 (with kernels 2.8 to 4.0 times as fast as fp32 on 2 cores with VNNI); fp16 is slow on a CPU"
    if flags:
        return "int8 (with kernels 1.3 to 2.0 times as fast as fp32 on 2 cores without VNNI); fp16 is slow on a CPU"
    return "unknown, as the instructions are; compare int8 with fp32"
