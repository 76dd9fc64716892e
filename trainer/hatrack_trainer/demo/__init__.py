"""A demonstration that makes all it needs: a small base, three adapters, one server."""
