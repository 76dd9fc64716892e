"""Who calls: the tenant comes from the credential, never from a field."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from hatrack_server.api.threads import in_thread
from hatrack_server.errors import Unauthenticated
from hatrack_server.tenancy.keys import KeyStore

DEFAULT_TENANT = "default"
HEADER = "authorization"
SCHEME = "bearer"

# A gRPC handler gets a request and a context that can't carry more; each call is a task with its own variables.
_tenant: ContextVar[str] = ContextVar("tenant")

Context = grpc.aio.ServicerContext[Any, Any]


def tenant() -> str:
    """The tenant of the call that runs now; only within KeyGuard."""
    return _tenant.get()


class KeyGuard:
    """Refuses a call without a valid key; with `open_without_keys`, all are `default` until a key is made."""

    def __init__(self, keys: KeyStore, *, open_without_keys: bool) -> None:
        self._keys = keys
        self._open_without_keys = open_without_keys

    @asynccontextmanager
    async def __call__(self, context: Context) -> AsyncIterator[None]:
        """Names the call's tenant; raises Unauthenticated."""
        credential = next((str(value) for key, value in context.invocation_metadata() or () if key == HEADER), None)
        _tenant.set(await in_thread(self._tenant_of, credential))
        yield

    def _tenant_of(self, credential: str | None) -> str:
        if self._open_without_keys and not self._keys.any_keys():
            return DEFAULT_TENANT
        return self._keys.authenticate(_bearer(credential))


def _bearer(credential: str | None) -> str:
    if credential is None:
        raise Unauthenticated("the metadata `authorization: Bearer KEY` is missing")
    scheme, _, key = credential.partition(" ")
    if scheme.lower() != SCHEME or not key.strip():
        raise Unauthenticated("the metadata `authorization` must read `Bearer KEY`")
    return key.strip()
