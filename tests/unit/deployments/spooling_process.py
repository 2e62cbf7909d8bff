"""A process that writes entries as a router does, and is killed.

It opens requests, generates tokens and ends some of them. On standard output it says what a client has been told by
then: a line a request, once its entry is safe.
"""

import json
import sys
from pathlib import Path

from usage_entries import entry

from deployments.usage.entries import KILLED
from deployments.usage.spool import FileSpool


def main(directory: str) -> None:
    spool = FileSpool.create(Path(directory))
    seq = 0
    while True:
        for opened in range(3 * seq + 1, 3 * seq + 4):
            begun = {"writer": spool.writer, "opened": opened, "prompt_tokens": opened}
            number = spool.open(entry(seq, **begun, outcome=KILLED, output_tokens=0), 0.0)
            assert number is not None
            for count in range(1, 4):
                spool.note(number, count, 1.0)
                print(json.dumps({"opened": opened, "generated": count}), flush=True)
            if opened % 3 == 0:
                seq += 1
                spool.add(entry(seq, **begun, output_tokens=3), number)
                print(json.dumps({"opened": opened, "ended": True}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
