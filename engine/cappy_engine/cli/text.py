"""Write manifests, parity reports, rankings and totals as text for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cappy_engine.bulk.estimate import Estimate
from cappy_engine.bulk.totals import Totals
from cappy_engine.checks import printable
from cappy_engine.cpu.kernels import COST, Kernels
from cappy_engine.gpu.installation import Installation
from cappy_engine.gpu.preflight import Finding
from cappy_engine.native.build import Built
from cappy_engine.options import ScorerInfo
from cappy_engine.ranking import Candidate
from cappy_engine.tuning import Tuned


def describe_manifest(document: Mapping[str, Any]) -> str:
    """Tell where a bundle comes from, what it holds, and how right it is.

    >>> print(describe_manifest(open_bundle("cappy-bundle").manifest.document))
    """
    model, source, machine = document["model"], document["source"], document["machine"]
    lines = [
        f"model       {model['architecture']}, {model['layers']} layers, hidden {model['hidden_size']}, "
        f"{model['parameters'] / 1e6:.1f} M parameters, at most {model['max_length']} tokens a pair",
        f"source      {source['name']}" + (f" at revision {source['revision']}" if source["revision"] else ""),
        f"            {source['format']}, sha256 {source['sha256']}",
        f"exported    {document['created']} on {machine['cpu']} ({machine['system']})",
        "with        " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        "",
        "files",
    ]
    for name, entry in document["files"].items():
        lines.append(f"  {entry['bytes']:>13,} bytes  {entry['sha256'][:16]}  {name}")
    lines += ["", "graphs"]
    targets = document.get("targets", {})
    for target, part in {"cpu": document, **targets}.items():
        for precision, graph in part["graphs"].items():
            facts = ", ".join(f"{key} {_shown(value)}" for key, value in graph.items())
            lines.append(f"  {_model(target, precision)}  {facts}")
    if "tensorrt" in targets:
        lines += ["", f"buckets     {', '.join(map(str, targets['tensorrt']['buckets']))} tokens, for TensorRT"]
    return "\n".join([*map(printable, lines), "", describe_parity(document["parity"])])


def describe_parity(parity: Mapping[str, Any]) -> str:
    """Write a parity report: a row for each model, then the worst pairs.

    >>> print(describe_parity(open_bundle("cappy-bundle").manifest.document["parity"]))
    """
    pairs = parity["pairs"]
    models = {"cpu": parity["precisions"], **parity.get("targets", {})}
    rows = {_model(target, name): row for target, found in models.items() for name, row in found.items()}
    width = max(9, *map(len, rows))
    lines = [
        f"parity with {parity['reference']} on {parity['machine']['cpu']}",
        f"over {pairs['count']} pairs ({pairs['name']}) of {pairs['shortest']} to {pairs['longest']} tokens, "
        f"{pairs['truncated']} truncated, {pairs['groups']} groups of candidates, score std {pairs['score_std']:.3f}",
        f"  {'precision':<{width}}  max error  mean error  relative  Spearman  winners kept  batch shapes  limits",
    ]
    for name, row in rows.items():
        winners = "-" if row["winner_agreement"] is None else f"{100 * row['winner_agreement']:.1f}%"
        relative = row.get("relative_error")  # older bundles have none
        limits = ", ".join(f"{name} {value:g}" for name, value in row["limits"].items() if value is not None)
        lines.append(
            f"  {name:<{width}}  {row['max_error']:>9.2e}  {row['mean_error']:>10.2e}  "
            f"{'-' if relative is None else format(relative, '.2e'):>8}  {row['spearman']:>8.5f}  "
            f"{winners:>12}  {row['batch_shapes']:>12}  {limits or 'none'}"
        )
    if "targets" in parity:
        lines.append("  models for GPUs were run on the CPU provider, with stand-ins for what it lacks")
    for name, row in rows.items():
        lines += ["", f"  worst pairs, {name}:"]
        for worst in row["worst"]:
            lines.append(
                f"    {worst['error']:.2e}  PyTorch {worst['reference']:+.5f}  {name} {worst['score']:+.5f}  "
                f"pair {worst['pair']}, {worst['tokens']} tokens: {shorten(worst['instruction'])} -> "
                f"{shorten(worst['response'])}"
            )
    return "\n".join(map(printable, lines))


def describe_ranking(ranked: Sequence[Candidate]) -> str:
    """Write a table of candidates, best first.

    >>> print(describe_ranking(scorer.rank("Is the sky blue?", ["Yes", "No"])))
    """
    lines = ["rank   score  index  response"]
    for place, candidate in enumerate(ranked, start=1):
        exact = "  (fp32)" if candidate.is_exact else ""
        lines.append(
            f"{place:>4}  {candidate.score:>6.3f}  {candidate.index:>5}  {shorten(candidate.response, 90)}{exact}"
        )
    return "\n".join(lines)


def describe_info(info: ScorerInfo) -> str:
    """Say what a scorer runs: the bundle, the precision and the device.

    >>> describe_info(scorer.info)
    'cappy-bundle: int8 on cpu'
    """
    return f"{info.bundle}: {info.precision} on {_device(info)}"


def explain_info(info: ScorerInfo) -> str:
    """Say what a scorer runs, with all settings, and why.

    >>> print(explain_info(scorer.info))
    """
    threads = f"{info.threads} thread{'s' if info.threads > 1 else ''}"
    return (
        f"{info.bundle}: {info.precision} ({info.precision_reason}) on {_device(info)} ({info.device_reason}), "
        f"{threads}, mode {info.mode} ({info.mode_reason}), batches of up to {info.max_batch_tokens} tokens, padding "
        f"{info.padding}"
        + (f" up to {', '.join(map(str, info.buckets))} tokens" if info.buckets else "")
        + (f", kernels {info.kernels}" if info.kernels else "")
    )


def describe_tuned(tuned: Tuned) -> str:
    """Tell in a table what was measured, with the spread of its rounds; what was chosen, and where that is kept.

    >>> print(describe_tuned(tune("cappy-bundle")))
    """
    lines = ["mode        tokens a batch  tokens/s  min..max"]
    for trial in tuned.trials:
        is_chosen = (trial.mode, trial.max_batch_tokens) == (tuned.execution.mode, tuned.execution.max_batch_tokens)
        spread = f"{min(trial.rates):.0f}..{max(trial.rates):.0f}"
        lines.append(
            f"{trial.mode:<10}  {trial.max_batch_tokens:>14}  {trial.tokens_per_second:>8.0f}  {spread}"
            + ("  chosen" if is_chosen else "")
        )
    return "\n".join([*lines, f"kept in {tuned.path}"])


def describe_estimate(found: Estimate) -> str:
    """Tell what scoring a file takes: rows, tokens, speed, time, memory and disk.

    >>> print(describe_estimate(estimate(scorer, sample_file(Path("pairs.jsonl")))))
    """
    sample, tokens = found.sample, found.tokens
    p50, p95, most = (int(value) for value in np.percentile(tokens, [50, 95, 100]))
    time = duration(found.seconds)
    if found.spread is None:
        time += ", if all of the file is like its beginning, which alone was read"
    elif found.spread:
        time += f", give or take {100 * found.spread:.0f}%"
    facts = {
        "rows": f"{'' if sample.is_exact else 'about '}{sample.rows:,}; {len(sample.pairs):,} of them were measured",
        "bad rows": f"{sample.refused:,} of the sample; the first: {sample.problem}" if sample.refused else "",
        "tokens": f"{tokens.mean():.1f} a pair (half up to {p50}, 95% up to {p95}, longest {most}), about "
        f"{tokens.mean() * sample.rows:,.0f} in all; {100 * found.truncated_share:.1f}% of the pairs are truncated",
        "speed": f"{found.tokens_per_second:,.0f} tokens/s, {found.pairs_per_second:,.1f} pairs/s; "
        f"tokenising takes {100 * found.tokenize_share:.1f}% of the time",
        "time": time,
        "memory": "" if found.memory_bytes is None else f"about {found.memory_bytes / 1e6:,.0f} MB at most",
        "disk": f"about {sample.output_bytes / 1e6:,.1f} MB for the output; "
        f"the input has {sample.input_bytes / 1e6:,.1f} MB",
    }
    return "\n".join(f"{name:<10}{fact}" for name, fact in facts.items() if fact)


def duration(seconds: float) -> str:
    """Write a time in the two largest of its units.

    >>> duration(93784)
    '1 d 2 h'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    parts, rest = list[str](), round(seconds)
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def describe_cpu_only(findings: Mapping[str, Sequence[Finding]], installation: Installation) -> str:
    """Tell briefly what an installation without GPU support lacks, and what GPUs it leaves unused.

    >>> print(describe_cpu_only({"cpu": diagnose(installation, "cpu")}, installation))
    """
    packages = ", ".join(f"{name} {version}" for name, version in installation.runtime_packages.items())
    lines = [f"ONNX Runtime  {packages or 'no package'}"]
    for finding in findings["cpu"]:
        if not finding.is_ok:
            lines += [f"MISSING       {finding.name}: {finding.detail}", f"              fix: {finding.fix}"]
    gpus = ", ".join(gpu.name for gpu in installation.gpus)
    lines.append(f"GPU           {gpus or 'none was asked for'}; 'cappy doctor --device cuda' says what one needs")
    return "\n".join(lines)


def describe_kernels(kernels: Kernels, note: Built | None) -> str:
    """Tell which instructions the native library uses, by which compiler; or why it is not used, and what that costs.

    >>> print(describe_kernels(find_kernels(), read_note()))
    kernels       avx512; compiled by c++ (Debian 12.2.0-14+deb12u1) 12.2.0
    """
    if kernels.library is None:
        return f"kernels       {kernels.told}\n              {COST}; docs/deployment.md, Kernels, says how to get them"
    return f"kernels       {kernels.told}" + (f"; compiled by {note.compiler}" if note and note.compiler else "")


def describe_totals(totals: Totals, seconds: float) -> str:
    """Say in one line what was scored, and how fast.

    >>> describe_totals(Totals(pairs=10, tokens=300), 2.0)
    '10 pairs scored in 2.0 s (5.0 pairs/s, 150 tokens/s), 0 truncated'
    """
    facts = [f"{totals.pairs - totals.pairs_before} pairs scored in {seconds:.1f} s ({describe_rate(totals, seconds)})"]
    if totals.pairs_before:
        facts.append(f"{totals.pairs_before} before")
    facts.append(f"{totals.truncated} truncated")
    if totals.without_instruction:
        facts.append(f"{totals.without_instruction} with an empty instruction")
    if totals.refused:
        facts.append(f"{totals.refused} bad line{'s' * (totals.refused != 1)} skipped")
    if totals.blank_lines:
        facts.append(f"{totals.blank_lines} blank line{'s' * (totals.blank_lines != 1)}")
    return ", ".join(facts)


def describe_rate(totals: Totals, seconds: float) -> str:
    """Say how fast this run scores.

    >>> describe_rate(Totals(pairs=10, tokens=300), 2.0)
    '5.0 pairs/s, 150 tokens/s'
    """
    pairs, tokens = totals.pairs - totals.pairs_before, totals.tokens - totals.tokens_before
    return f"{pairs / seconds:.1f} pairs/s, {tokens / seconds:.0f} tokens/s" if pairs else "nothing"


def shorten(text: str, width: int = 48) -> str:
    """Shorten a text to one printable line of at most `width` characters.

    >>> shorten("one\\ntwo", 5)
    'one·…'
    """
    line = printable(text)
    return line if len(line) <= width else line[: width - 1] + "…"


def _device(info: ScorerInfo) -> str:
    return " ".join([info.device, *map(str, info.gpus)])


def _model(target: str, precision: str) -> str:
    return precision if target == "cpu" else f"{target} {precision}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {name}" for name, count in value.items() if count) or "none"
    if isinstance(value, list):
        return f"{len(value)}" if value else "none"
    return str(value)
