"""`python -m hatrack_client` is the `hatrack` command."""

from hatrack_client.cli import main

main()
