"""The same run by `hatrack train`; prints a TrainingMeasurement as its last line.

python benchmarks/hatrack_training.py BASE ROWS.jsonl --rows 2 --steps 3 --device cpu
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from training_clock import Clock
from training_options import LEARNING_RATE, TOKENS, child_arguments
from workload import RANK

from hatrack_trainer.config import TrainConfig
from hatrack_trainer.run import train


def main() -> None:
    """Trains."""
    args = child_arguments(__doc__)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.model_validate(
            {
                "base": {"model": str(args.base)},
                "adapter": {"rank": RANK, "alpha": 2 * RANK},
                "data": {"train": args.data, "max_length": TOKENS},
                "train": {
                    "max_steps": args.steps + 1,
                    "batch_size": args.rows,
                    "learning_rate": LEARNING_RATE,
                    "schedule": "constant",
                    "activation_checkpointing": args.checkpointing,
                },
                "output": {"dir": Path(folder) / "adapter"},
            }
        )
        train(config, on_step=lambda _step, _steps, loss: clock.step(loss))
    print(json.dumps(clock.found()))


if __name__ == "__main__":
    main()
