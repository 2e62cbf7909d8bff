"""A rank that does what it is told and holds no model: `python -m idle_rank FD`."""

import json
import os
import signal
import sys
import threading

from llm.parallel.channel import FrameKind, unpack_arrays
from llm.parallel.member import Leader


def main() -> None:
    leader = Leader(int(sys.argv[1]))
    settings = json.loads(leader.next_frame()[1])
    sums: list[int] = []
    tasks: list[tuple[int, list[object]]] = []
    while True:
        kind, payload = leader.next_frame()
        if kind is FrameKind.STEP:
            sums.append(sum(int(array.sum()) for array in unpack_arrays(payload, 2)))
            continue
        if kind is FrameKind.TASK:  # in reverse order, once it is told to, and how many steps came before each
            number, content = json.loads(payload)
            tasks.append((number, [settings["rank"], content, len(sums)]))
            if content == "reply":
                for reply in reversed(tasks):
                    leader.reply_to_task(*reply)
                tasks.clear()
            continue
        match json.loads(payload)["name"]:
            case "rank":
                leader.reply([settings["rank"], settings["color"]])
            case "sums":
                leader.reply(sums)
            case "fail":
                leader.fail("ValueError: no")
            case "wait":  # as on a device that waits for a rank that is lost
                from llm.parallel import ranks

                ranks._STUCK_S = 0.2
                lost = ranks.RankGroup(2, "idle_rank", {"color": "blue"}, on_gpus=True)
                os.kill(lost.process_ids[0], signal.SIGKILL)
                threading.Event().wait()
            case "lead":  # a group of its own, whose processes nobody else knows
                from llm.parallel.ranks import RankGroup

                group = RankGroup(3, "idle_rank", {"color": "blue"})
                leader.reply(group.process_ids)


if __name__ == "__main__":
    main()
