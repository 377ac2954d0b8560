"""Addresses as people write them in YAML: `~` and environment variables, which no shell has expanded there.

Errors: ConfigError for a variable that is not set."""

import os
import re
from pathlib import Path
from urllib.parse import quote

from pipeline.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand_address(address: str) -> str:
    """Return an address with `$NAME`, `${NAME}` and a leading `~` replaced; raise ConfigError for a variable that is not set.

    A folder whose own name holds a dollar sign can be written as a file:// address, with %24. Behind `:///`, as in
    sqlite:///~/runs.db, `~` is the home folder too."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        text = os.environ.get(name, "")
        if not text:
            raise ConfigError(
                f"{address!r} names the variable {name}, which is {'empty' if name in os.environ else 'not set'}: set {name}, or "
                "write the path itself (file:///... with %24 for a folder whose name holds a dollar sign)"
            )
        return quote(text) if address.startswith("file:") else text

    expanded = _VARIABLE.sub(value, address)
    scheme, separator, path = expanded.rpartition(":///") if ":///" in expanded else ("", "", expanded)
    if path == "~" or path.startswith("~/"):
        path = str(Path(path).expanduser()) + ("/" if path.endswith("/") else "")
    return f"{scheme}{separator}{path}"
