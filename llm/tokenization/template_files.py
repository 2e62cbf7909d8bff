"""Where a checkpoint keeps its chat templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.checkpoint.json_files import read_json_if_there, read_text, wrong_type
from llm.errors import ConfigError

_KEY = "chat_template"
_WANTED = "text, an object of texts by their names, or a list of objects with a name and a template"


def find_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Jinja text of a checkpoint's chat templates by name, `default` and others, each with the file it came from.

    Files of their own win over `tokenizer_config.json`, and this over `chat_template.json`, which older processors of
    models with images have. One that is empty, of which every chat would be an empty prompt, is none.

    Args:
        config: content of its `tokenizer_config.json`.

    Raises:
        ConfigError: a template cannot be read, or is no text.
    """
    sources: dict[str, tuple[str, str]] = {}
    processor = directory / "chat_template.json"
    for path, content in ((processor, read_json_if_there(processor)), (directory / "tokenizer_config.json", config)):
        sources |= {name: (text, str(path)) for name, text in _texts(content.get(_KEY), path).items() if text.strip()}
    files = {"default": directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            try:
                text = read_text(path)
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} cannot be read ({error}); download it again") from error
            if text.strip():
                sources[name] = text, str(path)
    return sources


def _texts(found: Any, path: Path) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, dict) and "default" in found:
        found = [{"name": name, "template": text} for name, text in found.items()]
    if not isinstance(found, list):
        raise wrong_type(path, _KEY, found, _WANTED)
    texts = {}
    for item in found:
        name, text = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise wrong_type(path, _KEY, found, _WANTED)
        texts[name] = text
    return texts
