"""Score in two processes, each with a scorer of its own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from cappy_engine import Scorer


def start() -> None:
    global scorer
    scorer = Scorer.open(threads=1)


def best(review: str) -> str:
    instruction = f"Is this review positive or negative?\n{review}"
    return scorer.rank(instruction, ["positive", "negative"])[0].response


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, initializer=start) as pool:
        print(list(pool.map(best, ["I loved every minute.", "The soup was cold and the waiter rude."])))
