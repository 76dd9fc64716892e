"""Generates the committed stubs from proto/hatrack/v1/*.proto, or with --check says whether they are up to date."""

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(out: Path) -> None:
    """Writes the stubs below `out`; raises SystemExit when protoc finds an error."""
    protos = sorted(str(path) for path in (ROOT / "hatrack/v1").glob("*.proto"))
    includes = [f"-I{ROOT}", f"-I{resources.files('grpc_tools') / '_proto'}"]
    targets = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(["protoc", *includes, *targets, *protos]):
        raise SystemExit("protoc failed")


def stubs(root: Path) -> dict[str, bytes]:
    """The stubs below `root` by file name."""
    return {path.name: path.read_bytes() for pattern in STUBS for path in (root / "hatrack/v1").glob(pattern)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if stubs(Path(folder)) != stubs(ROOT):
            sys.exit("the committed stubs are stale: run `make proto`")


if __name__ == "__main__":
    main()
