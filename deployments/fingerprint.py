"""The fingerprint of a model version, which routers and replicas compute in the same way."""

from deployments.model_config import ServedModelConfig, read_chat_template
from llm.checkpoint.fingerprint import fingerprint
from llm.checkpoint.hub import resolve_model_path


def fingerprint_of(config: ServedModelConfig) -> str:
    """A fingerprint of all that must be equal for one replica to continue another's request, and for token ids to
    match.

    Settings that change no text, such as batch sizes, limits and the name that clients use, do not count.

    Raises:
        CheckpointError, ConfigError: the checkpoint or the chat template is not there.
    """
    directories = [resolve_model_path(config.model)]
    if config.lora is not None:
        directories.append(resolve_model_path(config.lora))
    engine = config.engine
    settings: dict[str, object] = {
        "engine": config.engine_kind,
        "dtype": config.dtype,
        "quantization": engine.quantization,
        "kv_cache_dtype": engine.kv_cache_dtype,
    }
    template = read_chat_template(config)
    if template is not None:
        settings["chat_template"] = template
    return fingerprint(directories, [f"{name}={value}" for name, value in settings.items()])
