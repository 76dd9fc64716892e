from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import logging, structlog, warnings
from hatrack_server.logs import configure_logging
configure_logging()
secret = "hk_" + "secret"
structlog.get_logger("ours").info("generate", tokens=3)
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger("ours").exception("failed", error_id="e1")
    logging.getLogger("theirs").warning("plain %s", 1)
warnings.warn("deprecated")
"""

CHILD = """
import logging, multiprocessing, sys
from hatrack_server.logs import configure_logging

def child():
    heavy = {"torch", "grpc", "transformers"} & set(sys.modules)
    configure_logging()
    logging.getLogger("engine").warning("from the child")
    assert not heavy

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_every_record_is_a_json_line_and_shows_no_local_variables() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, second, third, fourth = map(json.loads, done.stderr.splitlines())
    assert (first["event"], first["tokens"], first["level"]) == ("generate", 3, "info")
    assert (second["error_id"], "ZeroDivisionError" in second["exception"]) == ("e1", True)
    assert (third["event"], third["logger"]) == ("plain 1", "theirs")
    assert (fourth["logger"], "UserWarning: deprecated" in fourth["event"]) == ("py.warnings", True)
    assert "hk_secret" not in done.stderr
    assert done.stdout == ""


def test_a_spawned_process_logs_alike_and_imports_nothing_heavy(tmp_path: Path) -> None:
    script = tmp_path / "spawns.py"
    script.write_text(CHILD)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["event"] == "from the child"
