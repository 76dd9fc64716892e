from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import logging, structlog
from hatrack_server.logs import configure_logging
configure_logging()
secret = "hk_" + "secret"
structlog.get_logger("ours").info("generate", tokens=3)
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger("ours").exception("failed", error_id="e1")
    logging.getLogger("theirs").warning("plain %s", 1)
"""


def test_every_record_is_a_json_line_and_shows_no_local_variables() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, second, third = map(json.loads, done.stderr.splitlines())
    assert (first["event"], first["tokens"], first["level"]) == ("generate", 3, "info")
    assert (second["error_id"], "ZeroDivisionError" in second["exception"]) == ("e1", True)
    assert (third["event"], third["logger"]) == ("plain 1", "theirs")
    assert "hk_secret" not in done.stderr
    assert done.stdout == ""
