"""A replica whose model two processes hold, through HTTP: the text of one process, and none left when it stops."""

from pathlib import Path

from in_process import DEMO, LocalClient, Service, end_service

from deployments.config import AppConfig
from deployments.replica.engine_replica import EngineReplica

QUESTIONS = ["What is 4 + 7?", "Spell banana backwards.", "Count from 3 to 9."]


async def answers_of(num_ranks: int) -> tuple[list[str], list[int]]:
    """The text of each answer, and the processes beside this one."""
    engine = {"tensor_parallel_size": num_ranks, "max_seq_len": 512}
    config = AppConfig(model=str(DEMO), device="cpu", engine=engine)
    replica = EngineReplica(config, "replica-0")
    service = Service(config, LocalClient([replica]))
    await service.router.wait_until_ready()
    texts = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        reply = await service.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=40)
        assert reply.status_code == 200, reply.text
        texts.append(reply.json()["choices"][0]["message"]["content"])
    pids = replica._loop._engine.rank_process_ids
    del replica
    await end_service(service)
    return texts, pids


async def test_text_of_two_ranks_is_that_of_one():
    alone, nobody = await answers_of(1)
    together, pids = await answers_of(2)
    assert together == alone
    assert (len(nobody), len(pids)) == (0, 1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
