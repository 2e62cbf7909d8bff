"""Environment variables of processes that hold parts of a model."""

ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_GRAPH_REGISTER": "0",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""Set in every participating process. NVLink multicast stays off, since a program that uses it can put a shared machine
out of service. Each rank captures its graphs by itself, without buffers that all would have to register. All ranks are
on one node, so NCCL's sockets, by which they find each other, listen only on the loopback interface."""
