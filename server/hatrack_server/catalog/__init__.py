"""Adapters' names, versions and files, and the gate that uploads pass. No torch, no grpc."""

from hatrack_server.catalog.catalog import Catalog
from hatrack_server.catalog.gate import Checked, check
from hatrack_server.catalog.leases import Lease
from hatrack_server.catalog.records import AdapterRecord, AdapterState, VersionRecord
from hatrack_server.catalog.upload import DeclaredFile, Upload

__all__ = [
    "AdapterRecord",
    "AdapterState",
    "Catalog",
    "Checked",
    "DeclaredFile",
    "Lease",
    "Upload",
    "VersionRecord",
    "check",
]
