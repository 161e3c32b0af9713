"""``python -m ds_lightning COMMAND ...``: finds the command and imports its module, no other."""

from __future__ import annotations

import sys
from importlib import import_module

# A command: the module whose `main(argv)` it is, and what it does.
COMMANDS = {
    "plan": ("ds_lightning.plan_command", "find the schedule that suits a network, beside what else there is"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for wrong input, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m ds_lightning COMMAND [--help] ...\n\ncommands:")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<20}{what}")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"error: no command {words[0]!r}. HINT: there is {', '.join(map(repr, COMMANDS))}.", file=sys.stderr)
        return 2
    try:
        code: int = import_module(COMMANDS[words[0]][0]).main(words[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
