"""Open what training leaves, and load its model.

`hub.py` finds the files, `config.py` judges the configs, `weights.py` reads the weights, `models.py` builds the model;
`fast_tokenizer.py` loads the tokenizer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cappy_engine.errors import CheckpointError
from cappy_engine.storage import sha256_of
from cappy_export.checkpoints.activation import find_activation
from cappy_export.checkpoints.config import has_head, read_config, read_json
from cappy_export.checkpoints.cross_encoder import read_cross_encoder
from cappy_export.checkpoints.hub import (
    CROSS_ENCODER_FILES,
    TOKENIZER_FILES,
    locate,
    refuse_adapter,
    refuse_pointers,
    weight_files,
)
from cappy_export.checkpoints.models import build_model, fit_encoder, model_config, unused_weights, with_dropout
from cappy_export.checkpoints.naming import listed
from cappy_export.checkpoints.refusals import refusing
from cappy_export.checkpoints.score_modules import ScoreModules, with_head_weights
from cappy_export.checkpoints.weights import (
    check_counts,
    check_finite,
    check_keys,
    check_plain,
    explain_by_index,
    read_weights,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Hold a checkpoint on disk, judged but not loaded. `weight_files` are in `folder`; `revision` is a hub commit.

    `score` says what its authors' tools apply to the model's output (`activation.py`). Without `has_head` the files
    hold an encoder, and `config` is of the same encoder with a head for one score. `modules` are the head's, where it
    lies beside the encoder.
    """

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    format: str
    weight_files: tuple[str, ...]
    score: Mapping[str, str | None]
    has_head: bool = True
    modules: ScoreModules | None = None

    @property
    def weight_paths(self) -> list[Path]:
        """Give the files that hold weights: all of `weight_files` but an index."""
        return [self.folder / name for name in self.weight_files if not name.endswith(".index.json")]

    @property
    def index(self) -> Path | None:
        """Give the index file if the weights lie in several files. It says which weight lies where."""
        return next((self.folder / name for name in self.weight_files if name.endswith(".index.json")), None)

    @property
    def files(self) -> dict[str, str]:
        """Compute the sha256 of every file that the export reads, by name."""
        names = (
            "config.json",
            *self.weight_files,
            *(self.modules.files if self.modules else ()),
            *(name for name in (*TOKENIZER_FILES, *CROSS_ENCODER_FILES) if (self.folder / name).is_file()),
        )
        return {name: sha256_of(self.folder / name) for name in names}


def digest_of_files(files: Mapping[str, str]) -> str:
    """Compute one sha256 for a set of files, given theirs by name.

    >>> digest_of_files({"config.json": "ab", "model.safetensors": "cd"})[:8]
    '9015b2f5'
    """
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(files.items())).encode()).hexdigest()


def open_checkpoint(source: str | Path, *, revision: str | None = None, needs_head: bool = True) -> Checkpoint:
    """Find and judge a checkpoint: a local folder, or a hub id, downloaded at `revision`.

    >>> open_checkpoint("export/cappy_mini/checkpoint").format
    'safetensors'

    With HF_HUB_OFFLINE set, a hub id is one that was downloaded before. Weights are taken from safetensors, else .bin,
    else Flax's msgpack. Unless it `needs_head`, a model without a head for one score is taken, too. Raises
    CheckpointError, which says what was found and what is needed.
    """
    found = locate(source, revision=revision)
    refuse_adapter(found.folder, found.name)
    saved = read_cross_encoder(found.folder, needs_head=needs_head)
    head = saved.modules.config if saved.modules else None
    config = read_config(found.folder, found.name, needs_head=needs_head, head=head)
    told = read_json(found.folder / "config.json")
    score = find_activation(told, found.folder / "config.json", saved.config)
    format_, files = weight_files(found.folder, found.name)
    refuse_pointers(found.folder, found.name, (*files, *TOKENIZER_FILES))
    is_whole = needs_head or has_head(told) or saved.modules is not None
    return Checkpoint(found.name, found.commit, found.folder, config, format_, files, score, is_whole, saved.modules)


def load_model(checkpoint: Checkpoint, *, is_quiet: bool = False, attention: str = "eager") -> PreTrainedModel:
    """Load the checkpoint's model in PyTorch: float32, evaluation mode, `attention` as transformers calls it.

    >>> load_model(open_checkpoint("export/cappy_mini/checkpoint")).config.num_labels
    1

    Weights of other heads, which transformers ignores too, are left out; a warning says so, unless `is_quiet`.

    Raises CheckpointError if the weights cannot be read safely, are not plain finite numbers, or do not fit the config.
    All this is found out before memory is taken for the model. All missing, unexpected and misshapen keys are in one
    error.
    """
    return load_with_head(checkpoint, is_quiet=is_quiet, attention=attention)[0]


def shape_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the checkpoint's model without its weights: it has shapes, and takes neither time nor memory.

    >>> shape_model(open_checkpoint("export/cappy_mini/checkpoint")).device
    device(type='meta')

    Raises CheckpointError if the config describes no model.
    """
    with refusing(f"config.json of {checkpoint.name} describes no model"):
        config = model_config(checkpoint.config)
        check_counts(config, ())
        return build_model(config, is_hollow=True)


def float32_bytes(checkpoint: Checkpoint, model: PreTrainedModel) -> int:
    """Count the bytes of a checkpoint's `model` in float32.

    >>> checkpoint = open_checkpoint("export/cappy_mini/checkpoint")
    >>> float32_bytes(checkpoint, shape_model(checkpoint))

    The result is at most what the checkpoint's files can hold: a weight takes two bytes or more in a file. If a config
    asks for more, it does not fit its weights, and `load_model` says so.
    """
    described: int = sum(parameter.nbytes for parameter in model.parameters())
    return min(described, 2 * sum(path.stat().st_size for path in checkpoint.weight_paths))


def load_with_head(
    checkpoint: Checkpoint, *, is_quiet: bool = False, attention: str = "eager", dropout: float | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Load the checkpoint's model as `load_model` does; returns the names of weights that begin at random, too.

    >>> load_with_head(open_checkpoint("export/cappy_mini/checkpoint"))[1]
    []

    These are of the head, where the checkpoint has none. PyTorch's random numbers decide what they are. `dropout` takes
    the place of all rates of the config, for a training.
    """
    name, described = checkpoint.name, f"config.json of {checkpoint.name} describes no model"
    with refusing(described):
        config = model_config(checkpoint.config)
    try:
        weights = read_weights(checkpoint.weight_paths, checkpoint.format)
        if checkpoint.modules:
            weights = with_head_weights(checkpoint.folder, checkpoint.modules, weights)
        check_counts(config, weights)
        with refusing(described):
            hollow = build_model(config, is_hollow=True)
            needed, new = hollow.state_dict(), list[str]()
            if not checkpoint.has_head:
                weights, new = fit_encoder(hollow, weights)
                needed = {key: value for key, value in needed.items() if key not in new}
            unused = unused_weights(hollow, weights)
        check_plain({key: value for key, value in weights.items() if key in needed})
        check_keys(needed, weights, unused)
        weights = {key: value for key, value in weights.items() if key in needed}
        check_finite(weights)
    except CheckpointError as error:
        files, index = checkpoint.weight_paths, checkpoint.index
        cause = "" if index is None else explain_by_index(index, files, checkpoint.format)
        raise CheckpointError(f"{name} ({checkpoint.format} weights): {error}{cause}") from error
    if unused and not is_quiet:
        log.warning("%s: ignoring %d weights that its model does not use: %s", name, len(unused), listed(unused))
    with refusing(described):
        model = build_model(config if dropout is None else with_dropout(config, dropout), attention=attention)
    model.load_state_dict(weights, strict=False)  # copies into float32
    return model.eval(), new
