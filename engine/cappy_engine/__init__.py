"""Score (instruction, response) pairs with Cappy, on ONNX Runtime.

>>> from cappy_engine import Scorer
>>> with Scorer.open("bundle") as scorer:
...     scores = scorer.score([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")])
...     best = scorer.rank("Is the sky blue?", ["Yes", "No"])[0]
"""

from cappy_engine.errors import CappyError
from cappy_engine.opening import ScorerInfo
from cappy_engine.scorer import Candidate, Scored, Scorer

__version__ = "0.1.0"
__all__ = ["Candidate", "CappyError", "Scored", "Scorer", "ScorerInfo", "__version__"]
