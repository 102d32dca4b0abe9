"""Remove models from a bundle that a machine does not need: precisions, and those for other devices.

The models that stay are not touched: they keep their digests and their rows of the parity report. Needs no PyTorch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cappy_engine.bundle import BUNDLE, MANIFEST, TARGETS, Bundle, open_bundle, seal
from cappy_engine.bundle_files import EXTERNAL_SUFFIX
from cappy_engine.checks import check_flag, check_names
from cappy_engine.errors import BundleError, PrecisionUnavailable
from cappy_engine.publish import check_folder, publish, staging_folder
from cappy_engine.storage import write_json

log = logging.getLogger(__name__)
Models = Collection[tuple[str, str]]
"""Models by target and precision."""


def slim(
    bundle: str | Path,
    *,
    precisions: Collection[str] | None = None,
    targets: Collection[str] | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Keep only the models of these precisions and targets (None: all); returns the new manifest.

    Files of models that are not kept may be missing.

    Without `out` the bundle itself becomes smaller. With it the bundle is kept, and the smaller one is a new folder. A
    bundle that is there already is replaced with `force`, once the new one is complete.

        >>> slim("cappy-bundle", precisions=["int8"], out="cappy-int8")["precisions"]
        ['int8']

    Raises PrecisionUnavailable if no model would be left, or one that was named does not exist; BundleError if the
    bundle is damaged; OutputError if `out` must not be written; OSError if files cannot be; ValueError for one text
    instead of a list.
    """
    check_flag("force", force)
    if force and out is None:
        raise ValueError("force replaces a bundle at out, and no out was given")
    opened = open_bundle(bundle)
    place = None if out is None else check_folder(Path(out), BUNDLE, force=force, inputs=_files_of(opened))
    precisions = None if precisions is None else check_names("precisions", precisions)
    targets = None if targets is None else check_names("targets", targets)
    kept = _choose(opened, precisions, targets)
    for target, precision in kept:
        opened.check_model(precision, target)
    dropped = {name for name in opened.manifest.files if _is_dropped(name, kept)}
    try:
        document = _slim_document(opened.manifest.document, kept, dropped)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"the manifest of {bundle} is not one of an export ({error!r}); export it again") from error
    if place is None:
        _check_no_links(opened.path, dropped)
        # First the manifest: stopped between both, the files that are left over are named by `open_bundle`.
        write_json(opened.path / MANIFEST, document)
        _remove(opened.path, dropped)
    else:
        _copy(opened, place, document, force=force)
    return document


def _choose(
    bundle: Bundle, precisions: Collection[str] | None, targets: Collection[str] | None
) -> list[tuple[str, str]]:
    """Choose the models to keep, as (target, precision)."""
    there = [(target, name) for target in TARGETS for name in bundle.manifest.precisions_for(target)]
    shown = ", ".join(f"{name} for {target}" for target, name in there)
    for asked, place, what in ((targets, 0, "target"), (precisions, 1, "precision")):
        for name in asked or ():
            if not any(model[place] == name for model in there):
                raise PrecisionUnavailable(f"bundle {bundle.path} has no model of the {what} {name!r}, only {shown}")
    kept = [
        (target, name)
        for target, name in there
        if (targets is None or target in targets) and (precisions is None or name in precisions)
    ]
    if not kept:
        raise PrecisionUnavailable(f"nothing would be left of bundle {bundle.path}, which has {shown}")
    return kept


def _is_dropped(name: str, kept: Models) -> bool:
    model = name.removesuffix(EXTERNAL_SUFFIX)
    models = {file: (target, precision) for target, files in TARGETS.items() for precision, file in files.items()}
    return model in models and models[model] not in kept


def _slim_document(document: Mapping[str, Any], kept: Models, dropped: Collection[str]) -> dict[str, Any]:
    """Copy a manifest without the entries of dropped models, and seal it."""
    parity, canary = document.get("parity", {}), document.get("canary", {})
    parts = {target: _part(part, target, kept) for target, part in document.get("targets", {}).items()}
    targets = {target: part for target, part in parts.items() if part["precisions"]}

    def of_targets(found: Mapping[str, Any]) -> dict[str, Any]:
        return {target: _rows(found.get(target, {}), target, kept) for target in targets}

    tolerance = {target: _rows(rows, target, kept) for target, rows in canary.get("tolerance", {}).items()}

    changed = {
        **_part(document, "cpu", kept),
        "files": {name: entry for name, entry in document["files"].items() if name not in dropped},
        "targets": targets,
        "parity": {
            **parity,
            "precisions": _rows(parity.get("precisions", {}), "cpu", kept),
            "targets": of_targets(parity.get("targets", {})),
        },
        "canary": {**canary, "tolerance": {target: rows for target, rows in tolerance.items() if rows}},
    }
    if not targets:
        del changed["targets"], changed["parity"]["targets"]
    if not changed["canary"]["tolerance"]:
        del changed["canary"]
    return seal({name: part for name, part in changed.items() if name in document})


def _part(part: Mapping[str, Any], target: str, kept: Models) -> dict[str, Any]:
    """Keep the part of a manifest about one target's kept models."""
    precisions = [name for name in part["precisions"] if (target, name) in kept]
    return {**part, "precisions": precisions, "graphs": _rows(part.get("graphs", {}), target, kept)}


def _rows(rows: Mapping[str, Any], target: str, kept: Models) -> dict[str, Any]:
    return {precision: row for precision, row in rows.items() if (target, precision) in kept}


def _files_of(bundle: Bundle) -> list[Path]:
    """List what is read: the folder, and its files, which may be links."""
    return [bundle.path, *(bundle.path / name for name in bundle.manifest.files)]


def _copy(bundle: Bundle, out: Path, document: Mapping[str, Any], *, force: bool) -> None:
    """Write the smaller bundle into a new folder. The folder gets its name when it is complete."""
    with staging_folder(out, log.warning) as staging:
        for name in document["files"]:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, staging / name)
        write_json(staging / MANIFEST, document)
        publish(staging, out, BUNDLE, force=force)


def _check_no_links(folder: Path, names: Collection[str]) -> None:
    """Raise BundleError if one of these files lies in a linked folder: it is not the bundle's own."""
    for parent in sorted({str(Path(name).parent) for name in names}):
        if (folder / parent).is_symlink():
            raise BundleError(
                f"{parent} in bundle {folder} is a link to another folder, in which nothing is removed; write the "
                "smaller bundle to a folder of its own (--out), or put the folder itself there"
            )


def _remove(folder: Path, names: Collection[str]) -> None:
    """Remove the files, and the folders that they leave empty."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in names}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
