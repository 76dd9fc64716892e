"""What can go wrong in training, in sentences for the user.

TrainerError
├── UsageError             the user's mistake: `hatrack train` exits with 2
│   ├── ConfigError        a key of the YAML file
│   └── DataError          the data; its subclass InvalidData lists every wrong row, a line each
├── TrainingStopped        the run could not go on: exits with 1, and only checkpoints are left
│   └── NotFinite          a loss or a gradient is no number
└── NoEstimate             a step of this base can't be sketched: a run goes on without
"""


class TrainerError(Exception):
    """The root; its text is one sentence."""


class UsageError(TrainerError):
    """What was asked for is wrong."""


class ConfigError(UsageError):
    """The configuration is wrong; the sentence names the file and the key."""


class DataError(UsageError):
    """The data is wrong, or the base lacks what learning it needs."""


class TrainingStopped(TrainerError):
    """The run could not go on."""


class NotFinite(TrainingStopped):
    """A loss or a gradient is not a number, and would be again from the weights that it came of."""


class NoEstimate(TrainerError):
    """It is not known how much memory the run needs."""
