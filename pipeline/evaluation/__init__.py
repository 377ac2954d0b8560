"""How good is an encoder? One file per protocol in `protocols/`, over shared encoder sources and cached features."""
