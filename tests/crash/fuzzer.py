"""Lets atheris look for bytes that a decoder of `fuzz.py` does not take well.

python fuzzer.py TARGET [-runs=N] [-seed=N] ...    # the options are libFuzzer's
"""

import random
import sys

import atheris

with atheris.instrument_imports(include=["handfast"]):
    import fuzz

if __name__ == "__main__":
    target = fuzz.TARGETS[sys.argv.pop(1)]
    chance = random.Random()

    def one(data: bytes) -> None:
        """Feed the bytes; some of all choose a change of a sound sample instead."""
        if data[:1] and data[0] < 32:
            chance.seed(data)
            data = fuzz.mutated(chance.choice(target.samples), chance)
        fuzz.feed(target, data)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
