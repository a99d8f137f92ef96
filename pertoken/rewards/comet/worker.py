"""What runs in the environment of COMET, by the Python there and without this package.

    python worker.py MODEL BATCH

It says once whether the model is there; then, for each line with a JSON list of translations (`src`, `mt`, `ref`), a
line with their scores. Whatever libraries print goes to the standard error.
"""

import importlib
import json
import os
import sys


def main() -> None:
    """Answer until nobody asks any more."""
    name, batch = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**told: object) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    try:
        comet = importlib.import_module("comet")
        model = comet.load_from_checkpoint(name if os.path.isfile(name) else comet.download_model(name))
    except Exception as error:  # whatever is wrong with it is told
        tell(error=f"{type(error).__name__}: {error}")
        return
    tell(ready=True)
    for line in sys.stdin:
        try:
            found = model.predict(json.loads(line), batch_size=batch, gpus=0, progress_bar=False)
            tell(scores=[float(score) for score in found.scores])
        except Exception as error:
            tell(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
