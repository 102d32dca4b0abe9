"""Score candidates again in fp32 if another precision may have ordered them wrongly."""

from __future__ import annotations

import threading

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.bundle import Bundle
from cappy_engine.dispatcher import CLOSED, Dispatcher
from cappy_engine.errors import ScoringError
from cappy_engine.forking import tell_after_fork
from cappy_engine.opening import open_dispatcher
from cappy_engine.options import ScorerInfo


class ExactModel:
    """The fp32 model beside the one that `info` tells of, with its settings; opened when it is first run."""

    def __init__(self, bundle: Bundle, info: ScorerInfo) -> None:
        self.bundle = bundle
        self._info = info
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None
        self._is_closed = False
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Make the lock anew in a forked child; the dispatcher cares for itself."""
        self._lock = threading.Lock()

    def reach(self) -> float:
        """Tell how far below the best score fp32's winner may be: 0 in fp32.

        Raises PrecisionUnavailable if the bundle has no fp32 model, and BundleError if it tells no errors.
        """
        if self._info.precision == "fp32":
            return 0.0
        self.bundle.model("fp32", self._info.device)
        return 2 * self.bundle.largest_error(self._info.precision, self._info.device)

    def open(self) -> Dispatcher:
        """Open the model, unless that was done. Raises BundleError if the bundle changed, ScoringError if closed."""
        with self._lock:
            if self._is_closed:
                raise ScoringError(CLOSED)
            dispatcher = self._dispatcher
            if dispatcher is None:
                with self.bundle.used_again():
                    dispatcher, _ = open_dispatcher(self.bundle, self._info.exact(), name=self._info.bundle)
                self._dispatcher = dispatcher
                if self._is_closed:  # meanwhile
                    self.close()
                    raise ScoringError(CLOSED)
            return dispatcher

    def run(self, encoded: EncodedPairs) -> Scores:
        """Score pairs in fp32. Raises what `open` raises, and ScoringError."""
        return self.open().run(encoded)

    def close(self) -> None:
        """Free the model; running afterwards raises ScoringError.

        It takes no lock: a signal handler may call it while its own thread opens the model.
        """
        self._is_closed = True
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            dispatcher.close()
