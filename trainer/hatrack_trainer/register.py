"""`--register`: what is asked of the server before a run, so that a mistake doesn't cost it, and the push after it."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hatrack.manifest import BaseIdentity
from hatrack_client import (
    DEFAULT_SERVER,
    Adapter,
    Client,
    Generation,
    HatrackClientError,
    ResourceExhausted,
    Unavailable,
)
from hatrack_trainer.config import RegistrationSection
from hatrack_trainer.errors import TrainerError, UsageError

CHECK_SECONDS = 10.0
ANSWER_SECONDS = 120.0
RETRY_SECONDS = 1.0

# Where the client's arguments are set.
KEYS = {"server": "registration.server", "tls_ca": "registration.tls_ca", "api_key": "HATRACK_API_KEY"}


@dataclass(frozen=True, slots=True)
class Registered:
    """The version that an artifact has become, and that has answered."""

    name: str
    version: int
    digest: str
    live: bool
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        state = "is live" if self.live else f"is staged (live by `hatrack adapters promote {self.name} {self.version}`)"
        return f"{self.name}@{self.version} {state} and answers, digest {self.digest}"


class Registration:
    """One adapter's name on one server; credentials are those of the command, `HATRACK_API_KEY`."""

    def __init__(self, section: RegistrationSection) -> None:
        """Asks the server for its base.

        Raises UsageError without a name, and when the server can't be reached or refuses the key.
        """
        if section.name is None:
            raise UsageError("registration.name: missing, and needed by --register")
        self._name = section.name
        self._section = section
        self._server = section.server or os.environ.get("HATRACK_SERVER") or DEFAULT_SERVER
        try:
            with self._client(CHECK_SECONDS) as client:
                self._served = client.get_base()
        except HatrackClientError as error:
            place = KEYS.get(error.field, f"registration.server: {self._server}")
            raise UsageError(f"{place}: {error.message}") from error

    def check_base(self, base: BaseIdentity) -> None:
        """Raises UsageError unless the server serves the very base that is to be trained on, its template included."""
        served = asdict(self._served)
        differing = ", ".join(key.replace("_", " ") for key, digest in asdict(base).items() if served[key] != digest)
        if differing:
            raise UsageError(
                f"base.model: the server at {self._server} serves another base; they differ in: {differing}"
            )

    def push(self, folder: Path) -> Registered:
        """Uploads the artifact and waits until the server answers with it.

        Raises TrainerError: the artifact stays where it is, and the sentence names the command that goes on.
        """
        try:
            with self._client(None) as client:
                adapter = client.push_adapter(self._name, folder, stage=self._section.stage)
        except HatrackClientError as error:
            command = shlex.join(["hatrack", "adapters", "push", self._name, str(folder), *self._options()])
            raise TrainerError(f"{folder} is whole, but was not pushed: {error}; push it by `{command}`") from error
        return self._answered(adapter)

    def _answered(self, adapter: Adapter) -> Registered:
        reference = f"{adapter.name}@{adapter.version}"
        try:
            with self._client(ANSWER_SECONDS) as client:
                answer = _first_answer(client, reference)
        except HatrackClientError as error:
            command = shlex.join(["hatrack", "generate", "Hello", "--adapter", reference, *self._connection()])
            raise TrainerError(f"{reference} is pushed, but does not answer: {error}; ask it by `{command}`") from error
        [warnings] = [version.warnings for version in adapter.versions if version.version == adapter.version]
        live = adapter.live_version == adapter.version
        return Registered(answer.adapter, answer.version, answer.digest, live, warnings)

    def _client(self, timeout: float | None) -> Client:
        key = os.environ.get("HATRACK_API_KEY")
        section = self._section
        return Client(self._server, api_key=key, tls=section.tls, tls_ca=section.tls_ca, timeout=timeout)

    def _options(self) -> list[str]:
        return [*(["--stage"] if self._section.stage else []), *self._connection()]

    def _connection(self) -> list[str]:
        section = self._section
        tls = ["--tls-ca", str(section.tls_ca)] if section.tls_ca else ["--tls"] if section.tls else []
        return ["--server", self._server, *tls]


def _first_answer(client: Client, reference: str) -> Generation:
    """One token; a server that is busy or has just failed gets time."""
    end = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            # One token in, one out: fits into the context behind whatever virtual tokens an adapter has.
            return client.generate(reference, token_ids=[0], max_tokens=1, temperature=0.0)
        except (ResourceExhausted, Unavailable) as error:
            if time.monotonic() >= end:
                raise
            time.sleep(error.retry_after or RETRY_SECONDS)
