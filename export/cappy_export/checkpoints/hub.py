"""Find a checkpoint's files: in a local folder, or on the hub, from where only the files that are needed come.

Knows nothing of the model: the same functions find a checkpoint to export and an LLM to sample from.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import read_json
from cappy_export.checkpoints.naming import listed

WEIGHT_FILES: Mapping[str, tuple[str, ...]] = {
    "safetensors": ("model.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    "msgpack": ("flax_model.msgpack",),
}
"""Formats in order of preference, with the files that tell them."""

TOKENIZER_FILES = tuple(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt
    sentencepiece.bpe.model spiece.model spm.model bpe.codes""".split()
)

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "spm.model")
"""A tokenizer has one of these files. The other files of a tokenizer only say more about it."""

ADAPTER = "adapter_config.json"
"""The file by which PEFT knows an adapter, such as LoRA's."""
MERGE = (
    "merge it into its model with PEFT's merge_and_unload(), save the result and the tokenizer, and give that folder"
)

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
"""The begin of what Git leaves in place of a file that it was not asked to fetch."""

CROSS_ENCODER_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files of sentence-transformers that say what its CrossEncoder does beside the model (`cross_encoder.py`)."""

OTHER_INPUTS = tuple(
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Files that sentence-transformers reads where there is no sentence_bert_config.json."""

CHAT_TEMPLATE = "chat_template.jinja"

HEAD_FILES = tuple(
    f"*_{name}"
    for name in """Pooling/config.json Dense/config.json Dense/model.safetensors
    LayerNorm/config.json LayerNorm/model.safetensors""".split()
)
"""Patterns of the files of modules that compute its score (`score_modules.py`)."""

SMALL_FILES = (
    "config.json",
    ADAPTER,
    *TOKENIZER_FILES,
    CHAT_TEMPLATE,
    *CROSS_ENCODER_FILES,
    *OTHER_INPUTS,
    *HEAD_FILES,
)
"""What a checkpoint has beside its weights."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Located:
    """Where a checkpoint lies: its `name` for people, the hub's `commit` (None: a local folder), and its `folder`."""

    name: str
    commit: str | None
    folder: Path


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    files: Sequence[str] = SMALL_FILES,
    formats: Sequence[str] = tuple(WEIGHT_FILES),
) -> Located:
    """Find a local folder, or download a hub id at `revision`: `files`, and the first of `formats` that is there.

    >>> locate("btan2/cappy-large", formats=())  # nothing but its config and tokenizer

    Nothing is read, and no code is downloaded. Raises CheckpointError.
    """
    if source == "":  # as a path it would be the current folder
        raise CheckpointError("an empty name of a checkpoint; is a variable not set?")
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a local folder; --revision is for hub ids")
        return Located(Path(os.path.realpath(folder)).name, None, folder)
    if folder.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        problem = "it is not a folder" if folder.exists() else "it does not exist"
        raise CheckpointError(f"{source} is not a checkpoint: {problem}")
    return download(str(source), revision=revision, files=files, formats=formats)


def download(name: str, *, revision: str | None, files: Sequence[str] = (), formats: Sequence[str] = ()) -> Located:
    """Download `files` of a hub repository, and weights in the first of `formats`.

    >>> found = locate("google/flan-t5-small", formats=())
    >>> download(found.name, revision=found.commit, formats=("safetensors", "bin"))

    With HF_HUB_OFFLINE set, `name` is a repository that was downloaded before; its commit is the one in the hub's
    cache. Downloads by the revision's name, not by its commit: only then the cache keeps what offline mode looks up.
    Raises CheckpointError.
    """
    commit, patterns = None, None
    try:
        if not constants.HF_HUB_OFFLINE:
            commit, patterns = _needed(name, revision, files, formats)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(
                f"{name}{f' at revision {revision}' if revision else ''} is not downloaded, and HF_HUB_OFFLINE is "
                "set; unset it, download it first, or set HF_HOME to where it was downloaded"
            ) from error
        raise CheckpointError(
            f"{name} is neither a local folder nor a hub checkpoint that can be downloaded: {error}"
        ) from error
    if commit not in (None, folder.name):  # the hub went away after it was asked, and an older download is there
        raise CheckpointError(f"{name} is at commit {commit}, but only {folder.name} is downloaded; run it again")
    return Located(name, folder.name, folder)


def refuse_adapter(folder: Path, name: str) -> None:
    """Raise CheckpointError if `folder` holds an adapter: what lies there is not the whole model, or another one.

    >>> refuse_adapter(Path("export/cappy_mini/checkpoint"), "cappy-mini")

    transformers puts an adapter onto its model, also where the model lies beside it.
    """
    if (folder / ADAPTER).exists():
        raise CheckpointError(f"{name} holds an adapter of PEFT, such as LoRA ({ADAPTER}); {MERGE}")


def refuse_outside(folder: Path, name: str, file: str) -> None:
    """Raise CheckpointError if a file for the bundle is a link out of the checkpoint.

    >>> refuse_outside(Path("export/cappy_mini/checkpoint"), "cappy-mini", "vocab.json")

    The hub's cache is allowed: it has links in `snapshots`, and their files in the `blobs` of the repository or cache.
    """
    if not (folder / file).is_file():
        return
    home, target = folder.resolve(), (folder / file).resolve()
    repository = next((each.parent for each in home.parents if each.name == "snapshots"), None)
    cache = () if repository is None else (repository / "blobs", repository.parent / "blobs")
    if not any(target.is_relative_to(each) for each in (home, *cache)):
        raise CheckpointError(f"{file} of {name} is a link to {target}, outside of the checkpoint; copy the file there")


def refuse_pointers(folder: Path, name: str, files: Iterable[str]) -> None:
    """Raise CheckpointError if one of the `files` is a pointer of Git LFS.

    >>> refuse_pointers(Path("export/cappy_mini/checkpoint"), "cappy-mini", ["model.safetensors"])

    Git LFS leaves a pointer where a file was not fetched.
    """
    for each in files:
        if (folder / each).is_file():
            with (folder / each).open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise CheckpointError(
                        f"{each} of {name} is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull"
                    )


def weight_files(
    folder: Path, name: str, *, formats: Sequence[str] = tuple(WEIGHT_FILES)
) -> tuple[str, tuple[str, ...]]:
    """Return the first of `formats` that lies in `folder`, and the names of its files: an index, then its shards.

    >>> weight_files(Path("my-checkpoint"), "my-checkpoint")
    ('safetensors', ('model.safetensors',))

    Raises CheckpointError if there are no weights, or an index names anything but files beside it.
    """
    for format_ in formats:
        for candidate in WEIGHT_FILES[format_]:
            if (folder / candidate).is_file():
                return format_, (candidate, *_shards(folder / candidate))
    wanted = ", ".join(WEIGHT_FILES[format_][0] for format_ in formats)
    found = listed(sorted(entry.name for entry in folder.iterdir()), at_most=20)
    raise CheckpointError(f"{name} has no weights: needed is one of {wanted} (or shards with an index); found {found}")


def _needed(
    name: str, revision: str | None, files: Sequence[str], formats: Sequence[str]
) -> tuple[str | None, list[str]]:
    """Ask for a hub repository's commit, and make patterns of the needed files."""
    info = HfApi().model_info(name, revision=revision)
    listed = [entry.rfilename for entry in info.siblings or []]
    patterns = list(files)
    for format_ in formats:
        names = WEIGHT_FILES[format_]
        if any(each in listed for each in names):
            stem, ending = names[0].rsplit(".", 1)
            patterns += [*names, f"{stem}-*-of-*.{ending}"]
            log.info("downloading %s (%s weights)", name, format_)
            break
    return info.sha, patterns


def _shards(index: Path) -> tuple[str, ...]:
    if not index.name.endswith(".index.json"):
        return ()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not a file beside it")
    return tuple(shards)
