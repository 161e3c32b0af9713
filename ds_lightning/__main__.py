"""``python -m ds_lightning COMMAND``: each command is a module with ``main(argv) -> exit code``."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {"probe": "ds_lightning.probe_command"}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"python -m ds_lightning: name a command: {known}. HINT: add --help after it.", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    command: int = import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    return command


if __name__ == "__main__":
    sys.exit(main())
