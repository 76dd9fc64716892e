CREATE TABLE tenants (
    tenant TEXT PRIMARY KEY,
    salt BLOB NOT NULL
) STRICT;

-- A deleted adapter's row stays, with live_version 0: name@1 must never mean other content than it did.
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    live_version INTEGER NOT NULL,
    last_version INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    UNIQUE (tenant, name)
) STRICT;

CREATE TABLE versions (
    adapter_id INTEGER NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    state TEXT NOT NULL,
    method TEXT NOT NULL,
    rank INTEGER NOT NULL,
    parameters INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    verified INTEGER NOT NULL,
    warnings TEXT NOT NULL,
    base_weights TEXT NOT NULL,
    base_quantization TEXT NOT NULL,
    create_time TEXT NOT NULL,
    PRIMARY KEY (adapter_id, version)
) STRICT;

CREATE INDEX versions_by_digest ON versions (digest);
