"""Who may call: API keys and the tenants they belong to."""

from hatrack_server.tenancy.keys import KeyRecord, KeyStore

__all__ = ["KeyRecord", "KeyStore"]
