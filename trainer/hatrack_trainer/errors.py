"""What can go wrong in training, in sentences for the user.

TrainerError
├── UsageError             the user's mistake: `hatrack train` exits with 2
│   ├── ConfigError        a key of the YAML file
│   └── DataError          the data; its subclass InvalidData lists every wrong row, a line each
└── TrainingStopped        the run could not go on: exits with 1, and nothing is written
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
