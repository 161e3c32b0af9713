"""``python -m ds_lightning COMMAND ...``: finds the command by its words and imports its module, no other."""

from __future__ import annotations

import sys
from importlib import import_module

# A command's words: the module whose `main(argv)` it is, and what it does.
COMMANDS = {
    "plan": ("ds_lightning.plan_command", "find the schedule that suits a network, beside what else there is"),
    "probe": ("ds_lightning.probe_command", "measure the network among the hosts of a job, and describe it"),
    "simulate learning": ("ds_lightning.learning_command", "train N virtual workers in this process, by any schedule"),
    "simulate time": ("ds_lightning.timing_command", "tell how long steps take on a cluster, by any schedule"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for wrong input, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    name = next((n for n in COMMANDS if words[: len(n.split())] == n.split()), None)
    if name is None:
        if not words or {"-h", "--help"} & set(words):
            print("usage: python -m ds_lightning COMMAND [--help] ...\n\ncommands:")
            for n, (_, what) in COMMANDS.items():
                print(f"  {n:<20}{what}")
            return 0 if words else 2
        print(f"error: no command {words[0]!r}. HINT: there is {', '.join(map(repr, COMMANDS))}.", file=sys.stderr)
        return 2
    try:
        code: int = import_module(COMMANDS[name][0]).main(words[len(name.split()) :])
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
