"""Exits 1 if the checked-in protobuf code is not what protoc makes of the .proto files given as arguments."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def main(protos: list[str]) -> int:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={out}", f"--pyi_out={out}"]
        subprocess.run([*command, f"--grpc_python_out={out}", *protos], check=True)
        fresh = {path.relative_to(out): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    stale = [str(path) for path, text in fresh.items() if not path.exists() or path.read_bytes() != text]
    if stale:
        print(f"stale generated code: {', '.join(sorted(stale))}; run: make protos")
        return 1
    print(f"{len(fresh)} generated files are fresh")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
