"""Who calls: the tenant comes from the credential, never from a field."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc

from hatrack_server.errors import Unauthenticated
from hatrack_server.tenancy.keys import KeyStore

DEFAULT_TENANT = "default"
SCHEME = "bearer"

# A gRPC handler gets a request and a context that can't carry more; each call is a task with its own variables.
_tenant: ContextVar[str] = ContextVar("tenant")

Context = grpc.aio.ServicerContext[Any, Any]


def tenant() -> str:
    """The tenant of the call that runs now; only within KeyGuard."""
    return _tenant.get()


class KeyGuard:
    """Refuses a call without a valid key. `open_without_keys`: as long as there is no key at all, everyone is `default`."""

    def __init__(self, keys: KeyStore, *, open_without_keys: bool) -> None:
        self._keys = keys
        self._open_without_keys = open_without_keys

    @asynccontextmanager
    async def __call__(self, context: Context) -> AsyncIterator[None]:
        """Names the call's tenant; raises Unauthenticated."""
        _tenant.set(self._tenant_of(context))
        yield

    def _tenant_of(self, context: Context) -> str:
        if self._open_without_keys and not self._keys.any_keys():
            return DEFAULT_TENANT
        return self._keys.authenticate(_bearer(context))


def _bearer(context: Context) -> str:
    metadata = context.invocation_metadata() or ()
    value = next((value for key, value in metadata if key == "authorization"), None)
    if value is None:
        raise Unauthenticated("the metadata `authorization: Bearer KEY` is missing")
    scheme, _, key = str(value).partition(" ")
    if scheme.lower() != SCHEME or not key.strip():
        raise Unauthenticated("the metadata `authorization` must read `Bearer KEY`")
    return key.strip()
