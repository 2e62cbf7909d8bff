"""What tests themselves build on: a service in this process leaves nothing behind."""

import gc
import weakref

from in_process import LocalClient, Service, emulated_config, end_service

from deployments.replica.engine_replica import EngineReplica


async def test_a_service_that_has_ended_keeps_no_engine():
    """A real engine holds 200 MB; hundreds of tests make one."""
    config = emulated_config()
    service = Service(config, LocalClient([EngineReplica(config, "replica-0")]))
    await service.router.wait_until_ready()
    assert (await service.post("/v1/completions", prompt="abc", max_tokens=5)).status_code == 200
    engine = weakref.ref(service.client.replicas[0]._loop._engine)
    await end_service(service)
    gc.collect()
    assert engine() is None, "FastAPI's caches keep the router; the router must not keep the engine"
